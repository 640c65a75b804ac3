"""Words for numbers."""


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `3 passes`, `4 micro-batches`, `5 epochs`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{number:,} {noun}{ending}"
