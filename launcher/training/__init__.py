"""How it trains: read `loop.py`, then `step.py`."""
