"""Benchmarks: their folders, their rules, and two checkpoints on the same prompts and seeds."""
