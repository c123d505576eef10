"""Results, tables, progress and provenance."""
