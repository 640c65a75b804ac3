"""Networks that this project did not write, and its own text of those that people write often."""
