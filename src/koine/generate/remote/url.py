"""Check an endpoint's URL, and read its API key from the environment."""

from __future__ import annotations

import os
import urllib.parse

from koine.errors import UserError

FORM = "give http://... or https://..."


def check_url(base_url: str) -> str:
    """Return `base_url` without a trailing slash.

    Raises `UserError` for an invalid URL, and for one with credentials, which the message does not repeat.
    """
    import httpx2

    if not isinstance(base_url, str):
        raise UserError("the address is no text", hint=FORM)
    if "@" in base_url or "?" in base_url or "#" in base_url:
        raise UserError(
            "the address holds a user, a password or a query",
            hint="put the key into an environment variable and give that variable's name",
        )
    try:
        url = httpx2.URL(base_url)
        # As the system's resolver encodes it: no label is empty or longer than 63 characters.
        url.raw_host.decode("ascii").encode("idna")
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise UserError(f"the address '{base_url:.200}' is none ({error})", hint=FORM) from None
    if url.scheme not in ("http", "https") or not url.host or not (url.port is None or 0 < url.port < 2**16):
        raise UserError(f"the address '{base_url:.200}' is none", hint=FORM)
    return base_url.rstrip("/")


def without_credentials(address: str) -> str:
    """Return a URL without user, password, query and fragment, for messages."""
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def read_api_key(variable: str) -> str:
    """Return the key in an environment variable. Raises `UserError`, which never contains the key."""
    if not isinstance(variable, str) or not variable.isidentifier() or _looks_like_key(variable):
        # It may be the key itself, so the message does not repeat it.
        raise UserError(
            "api_key_variable is no name of a variable",
            hint="put the key into an environment variable and give that variable's name",
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} is not set", hint=f"export {variable}=...")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"the environment variable {variable} holds no key",
            hint="a key is one word of plain letters, digits and signs",
        )
    return key


def _looks_like_key(name: str) -> bool:
    """Return whether a name is long, mixes cases and digits, and is not set in the environment."""
    mixed = name != name.upper() and name != name.lower() and any(letter.isdigit() for letter in name)
    return mixed and len(name) >= 24 and name not in os.environ
