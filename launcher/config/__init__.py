"""What a recipe can say: its slots, its settings, and the numbers of steps that follow."""
