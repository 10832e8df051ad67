"""Public functions of `koine.data`."""
