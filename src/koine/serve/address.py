"""Where an endpoint is and the key that opens it, both as the user gave them."""

from __future__ import annotations

import os

from koine.errors import UserError


def checked_address(base_url: str) -> str:
    """`base_url` without a slash at its end. Raises `UserError` for no address, or one that holds a password."""
    import httpx2

    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise UserError(
            f"the address '{base_url}' is none ({error})", mend="give http://... or https://..."
        ) from None
    if url.userinfo or url.query:
        raise UserError(
            "the address holds a user, a password or a query",
            mend="put the key into an environment variable and give that variable's name",
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"the address '{base_url}' is none", mend="give http://... or https://...")
    return base_url.rstrip("/")


def key_in_environment(variable: str) -> str:
    """The key in an environment variable. Raises `UserError`, which never holds the key."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} is not set", mend=f"export {variable}=...")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"the environment variable {variable} holds no key",
            mend="a key is one word of plain letters, digits and signs",
        )
    return key
