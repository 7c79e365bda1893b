"""What the device is: its clock, its memory, its errors; the only code that asks torch.cuda."""
