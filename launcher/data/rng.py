"""Random numbers that are derived, not stored: pure functions of a purpose and of numbers."""

import numpy

# What random numbers are for: generators of different purposes never share numbers.
ORDER, FRESH, FIXED, MIX, LAYERS, VALIDATION = range(6)


def make_rng(purpose: int, *numbers: int) -> numpy.random.Generator:
    """Random numbers that depend on the purpose and the numbers alone."""
    return numpy.random.default_rng([purpose, *numbers])
