"""CPU inference with prepacked weights."""
