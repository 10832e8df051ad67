"""Public functions of `koine.recipes`."""
