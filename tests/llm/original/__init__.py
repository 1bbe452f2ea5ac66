"""The router of the original, and the later names."""
