"""Messages of a conversation."""

from __future__ import annotations

Message = dict[str, str]
"""A message: `role` (system, user, assistant) and `content`."""
