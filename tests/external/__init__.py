"""Tests of what speaks to other servers."""
