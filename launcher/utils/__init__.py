"""What every package may use: atomic file writes, hidden secrets, numbers in words."""
