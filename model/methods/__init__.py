"""One file for each self-supervised method; registry.py finds them."""
