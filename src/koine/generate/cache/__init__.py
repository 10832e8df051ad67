"""KV cache: pages, prefixes, and attention over them."""
