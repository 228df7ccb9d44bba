"""Models for places where this package is not: one Python file beside the weights, and a card that says what they are."""
