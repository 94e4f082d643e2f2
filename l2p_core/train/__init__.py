"""Training: the objective."""
