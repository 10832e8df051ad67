"""Verbs of `koine merge`."""
