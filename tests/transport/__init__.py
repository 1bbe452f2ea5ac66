"""Tests of sessions on real sockets."""
