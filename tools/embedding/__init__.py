"""Embeddings of a dataset in a folder: written by tools/embed.py, searched by tools/neighbours.py."""
