"""LoRA (arXiv 2106.09685): low-rank adapters of a model whose own weights stay as they are."""
