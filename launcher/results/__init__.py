"""After a run: what was trained, to look at and to use."""
