"""Placeholder while the first lines are written."""
