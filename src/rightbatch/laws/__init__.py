"""Pure mathematics: no torch, plain numbers and NumPy arrays in, frozen records out."""
