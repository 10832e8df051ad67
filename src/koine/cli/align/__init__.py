"""Verbs of `koine align`."""
