"""What bits cost: bytes of the packed file, and bit operations."""
