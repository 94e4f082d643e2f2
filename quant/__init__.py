"""Checkpoint files made of checkpoint files, one tensor at a time."""
