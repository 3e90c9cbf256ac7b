"""Colours and axes shared by all plots."""

from __future__ import annotations

INK, QUIET = "#22313f", "#8a949e"
