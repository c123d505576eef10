"""The report for people: one HTML file, made from a work directory alone."""
