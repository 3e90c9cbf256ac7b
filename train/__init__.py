"""Pretraining and evaluation: scripts and the parts that they are built from."""
