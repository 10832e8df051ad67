"""Long-context evaluation: needles, RULER-class tasks, loss per position, attention mass and entropy."""
