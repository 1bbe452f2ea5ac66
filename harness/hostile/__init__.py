"""Hostile peers: raw bytes of our wire, the attacks on a worker, the lies to a client."""
