"""`launcher check`: finds mistakes of a recipe, and what it costs, in seconds."""
