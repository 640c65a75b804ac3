"""`launcher verify`: tests the project's promises for one recipe on this machine."""
