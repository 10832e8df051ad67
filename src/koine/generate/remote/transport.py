"""Send one call to an endpoint and read its response, up to a size limit."""

from __future__ import annotations

from dataclasses import dataclass

import httpx2

from koine.errors import UserError
from koine.generate.remote.protocol import max_response_bytes
from koine.generate.remote.redaction import Redactor
from koine.generate.remote.requests import Call
from koine.generate.remote.response_body import read_beginning, read_body

CONNECT_SECONDS = 10.0

# Nothing reached the endpoint, so it cannot have charged.
NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)

REFUSAL_BYTES = 1 << 16
"""Most bytes that are read of a response with an error status."""


@dataclass(frozen=True, kw_only=True)
class RawResponse:
    """A response. `content` is the body, up to the size limit."""

    status: int
    headers: httpx2.Headers
    content: bytes
    charset: str | None


def open_client(
    headers: httpx2.Headers, *, timeout: float, concurrency: int, redactor: Redactor
) -> httpx2.AsyncClient:
    """Open a client. Nothing is sent yet.

    Raises `UserError` where the environment names proxies or certificates that cannot be used.
    """
    try:
        return httpx2.AsyncClient(
            headers=headers,
            follow_redirects=False,
            timeout=httpx2.Timeout(None, connect=min(CONNECT_SECONDS, timeout)),
            limits=httpx2.Limits(max_connections=concurrency),
        )
    except (httpx2.InvalidURL, ValueError, ImportError, OSError) as error:
        raise UserError(
            f"no connection can be made with these settings ({redactor.line(describe_error(error))})",
            hint="correct HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR in the "
            "environment",
        ) from None


async def send(client: httpx2.AsyncClient, url: str, call: Call) -> RawResponse:
    """Send a call once. Raises `BodyError` for a body that is too long, and the errors of `httpx2`."""
    async with client.stream("POST", url, content=call.content) as response:
        if response.is_success:
            content = await read_body(response, max_response_bytes(call.completion_tokens))
        else:
            content = await read_beginning(response, REFUSAL_BYTES)
        return RawResponse(
            status=response.status_code,
            headers=response.headers,
            content=content,
            charset=response.charset_encoding,
        )


def describe_error(error: Exception) -> str:
    """Return an exception's type and text."""
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name
