"""Training on examples as they arrive."""
