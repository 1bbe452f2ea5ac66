"""Served models under faults: workers with mock engines, the front end of `trd http`, and clients over HTTP."""
