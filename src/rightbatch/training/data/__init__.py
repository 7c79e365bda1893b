"""Which examples each update sees, and how they are fetched."""
