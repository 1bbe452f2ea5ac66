"""Dynamic batching, one file a matter."""
