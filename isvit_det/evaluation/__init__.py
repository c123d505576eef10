"""Evaluation: what the metrics of a config measure, and on which data."""
