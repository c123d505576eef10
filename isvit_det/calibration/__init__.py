"""How parameters are learned, on anything that lists units."""
