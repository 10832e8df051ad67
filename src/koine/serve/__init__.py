"""Public functions of `koine.serve`."""
