"""Serving a language model."""
