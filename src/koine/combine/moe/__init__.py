"""Upcycle dense checkpoints to a mixture of experts."""
