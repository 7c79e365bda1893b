"""Whether a window of micro-batches is the whole batch, measured before training."""
