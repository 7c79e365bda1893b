"""What a step of our training loop costs beyond a hand-written one, and what others cost."""
