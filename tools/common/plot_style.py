"""Colours and axes shared by all plots."""

from __future__ import annotations

INK, QUIET = "#22313f", "#8a949e"
PALETTE = ("#1f5fa8", "#b4511d", "#1d7a4f", "#7d3f98", "#8a6d00", "#b3265f", "#3a7d8c", "#5b6b2f", "#a33b3b", "#555f6b")
