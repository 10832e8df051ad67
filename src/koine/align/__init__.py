"""Preference training: losses over preferred, labelled and scored completions."""
