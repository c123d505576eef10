"""Which parts of a detector low bits hurt, and bits chosen by that."""
