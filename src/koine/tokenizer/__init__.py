"""Public functions of `koine.tokenizer`."""
