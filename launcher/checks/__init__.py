"""Before a launch: what a training would take."""
