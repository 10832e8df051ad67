"""Names of the files beside a mixture's weights that belong to it."""

from __future__ import annotations

RECORD = "mixture.json"
"""Record of the models that a mixture was made of, and of its changes."""

DOMAIN_ENCODER = "domain_encoder"
"""Folder of the sentence encoder for the domain embeddings of a Nexus router."""
