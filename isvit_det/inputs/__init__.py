"""What users give: configs, data sets, images and hooks, and their faults."""
