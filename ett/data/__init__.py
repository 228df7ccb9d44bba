"""Where examples come from, and the order they come in."""
