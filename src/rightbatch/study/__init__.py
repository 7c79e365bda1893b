"""Designed experiments: the race that a plan runs, and what can be concluded from it."""
