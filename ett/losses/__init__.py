"""The terms of the joint objective."""
