"""The wire: frames, sessions and payloads without I/O."""
