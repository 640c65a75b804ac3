"""Before a launch: checks of the recipe, its promises, the machine and the cost."""
