"""Koine: build multilingual language models by mixing, and measure what each mix did."""

__version__ = "0.1.0"
__distribution__ = "koine-lm"
"""Name on the package index, where `koine` is another project."""
