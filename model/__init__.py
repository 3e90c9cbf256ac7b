"""Backbones, heads, and the methods that train them: all that a run puts on its device."""
