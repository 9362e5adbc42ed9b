"""A writer for each output format."""
