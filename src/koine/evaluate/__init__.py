"""Public functions of `koine.evaluate`."""
