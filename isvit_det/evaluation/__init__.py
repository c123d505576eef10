"""What the evaluators of a config measure, and on what."""
