"""Tests of what `triton_distributed.testing` gives to programs' own tests."""
