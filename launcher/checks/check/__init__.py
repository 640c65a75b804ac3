"""`launcher check`: what can be known of a recipe in seconds."""
