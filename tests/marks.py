"""Marks that several tests share."""
import pytest


def slow(*values):
    """Parameters of a test that is slow with these."""
    return pytest.param(*values, marks=pytest.mark.slow)
