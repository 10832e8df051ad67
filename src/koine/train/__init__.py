"""Public functions of `koine.train`."""
