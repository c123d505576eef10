"""Packed state dicts: integer codes in place of weights, with a header."""
