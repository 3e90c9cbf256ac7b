"""Batches of views, made ahead of use."""
