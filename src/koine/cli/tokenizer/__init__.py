"""Verbs of `koine tokenizer`."""
