"""TODO loggers."""
