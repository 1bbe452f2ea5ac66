"""The choice of an instance."""
