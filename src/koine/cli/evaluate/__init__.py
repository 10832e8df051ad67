"""Verbs of `koine evaluate`."""
