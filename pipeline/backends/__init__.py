"""Back ends: decode images, cut and colour their views."""
