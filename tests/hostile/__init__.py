"""Peers that mean harm, each small: what they can make a worker hold, and that others are served meanwhile."""
