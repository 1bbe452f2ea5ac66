"""The runtime against its contract, one file a matter."""
