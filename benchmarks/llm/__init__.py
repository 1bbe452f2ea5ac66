"""Speed of serving a model."""
