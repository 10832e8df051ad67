"""What lies beside the weights of a mixture and belongs to it: a folder that is made from a mixture's is not whole without."""

from __future__ import annotations

RECORD = "mixture.json"
"""What a mixture was made of, and how it was changed since."""

DOMAIN_ENCODER = "domain_encoder"
"""The folder of the encoder by which a Nexus router knows domains."""
