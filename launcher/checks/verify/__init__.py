"""`launcher verify`: does a recipe keep the promises, on this machine?"""
