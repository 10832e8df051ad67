"""Adapt a model to another vocabulary."""
