"""Public functions of `koine.plan`."""
