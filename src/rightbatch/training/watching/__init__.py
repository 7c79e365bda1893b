"""What can watch a run, and what it is told."""
