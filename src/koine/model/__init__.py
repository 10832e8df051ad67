"""Public functions of `koine.model`."""
