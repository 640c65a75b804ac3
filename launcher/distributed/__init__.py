"""Ranks: how they find each other, stop together, and who failed first."""
