"""Constrain generation to a JSON schema or a regular expression."""
