"""Merge checkpoints of one architecture."""
