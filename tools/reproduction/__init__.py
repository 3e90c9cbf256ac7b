"""The paper's experiments at the scale of a machine: tools/reproduce.py."""
