"""Messages of a conversation."""

from __future__ import annotations

Message = dict[str, str]
"""One message: its `role` ("system", "user" or "assistant") and its `content`."""
