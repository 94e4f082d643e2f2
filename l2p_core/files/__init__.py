"""Checkpoint files: their names, layouts and formats."""
