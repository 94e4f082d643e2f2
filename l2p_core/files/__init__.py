"""Files: written atomically; the names, layouts and formats of checkpoints."""
