"""The figures of the paper: which runs each needs, and what it draws of them. `scripts/reproduce.py` makes them."""
