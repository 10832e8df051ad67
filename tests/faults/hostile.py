"""A server that sends anything but a proper response: `python -m tests.faults.hostile` prints its port.

The first part of the URL's path names the behaviour: `http://127.0.0.1:PORT/cut-headers/v1`. For every
behaviour the client must end with one clear line or with a response, within bounds of time and memory, and
never show the key.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

KEY = "sk-secret-0123456789abcdefghij"
"""What must never show."""
PATIENCE = 4.0
"""Seconds that the client waits for a whole answer."""
MOST_SECONDS = 30.0
MOST_BYTES = 400 * 2**20
"""So much more memory may an answer take."""

Connection = socket.socket
Behaviour = Callable[[Connection, str], None]


def body_of(**changes: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "yes"},
        "logprobs": None,
        "finish_reason": "stop",
        **changes.pop("choice", {}),
    }
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    return {
        "id": "x",
        "object": "chat.completion",
        "model": "m",
        "choices": [choice],
        "usage": usage,
        **changes,
    }


def http(
    content: bytes | str | dict[str, Any],
    *,
    status: str = "200 OK",
    headers: tuple[str, ...] = (),
    length: int | None = None,
) -> bytes:
    if isinstance(content, dict):
        content = json.dumps(content)
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    size = len(data) if length is None else length
    lines = [
        f"HTTP/1.1 {status}",
        "Content-Type: application/json",
        f"Content-Length: {size}",
        *headers,
        "",
        "",
    ]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + data


def sends(content: bytes) -> Behaviour:
    return lambda connection, key: connection.sendall(content.replace(b"@KEY", key.encode()))


def endless(head: bytes, part: bytes, *, pause: float = 0.0, parts: int = 1 << 40) -> Behaviour:
    def behave(connection: Connection, key: str) -> None:
        connection.sendall(head)
        for _ in range(parts):
            connection.sendall(part)
            time.sleep(pause)

    return behave


def reset(before: bytes) -> Behaviour:
    def behave(connection: Connection, key: str) -> None:
        connection.sendall(before)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return behave


def silence(connection: Connection, key: str) -> None:
    time.sleep(4 * PATIENCE)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@cache
def bomb(size: int) -> bytes:
    """Return this many spaces, compressed."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [compressor.compress(b" " * 2**20) for _ in range(size >> 20)]
    return b"".join([*parts, compressor.flush()])


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = json.dumps(body_of()).encode()


@dataclass(frozen=True)
class Trick:
    """A behaviour. answers: the response must be used (True), must not be (False), or may be (None)."""

    behave: Behaviour
    answers: bool | None = False


def in_content(name: str, value: Any, answers: bool | None = False) -> tuple[str, Trick]:
    return name, Trick(
        sends(http(body_of(choice={"message": {"role": "assistant", "content": value}}))), answers
    )


def in_finish(name: str, value: Any, answers: bool | None = None) -> tuple[str, Trick]:
    return name, Trick(sends(http(body_of(choice={"finish_reason": value}))), answers)


def in_probabilities(name: str, value: Any, answers: bool | None = None) -> tuple[str, Trick]:
    return name, Trick(sends(http(body_of(choice={"logprobs": value}))), answers)


def with_key(name: str, content: bytes) -> tuple[str, Trick]:
    return f"key-{name}", Trick(sends(content), None)


TRICKS: dict[str, Trick] = dict(
    [
        ("good", Trick(sends(http(body_of())), True)),
        # Broken transport
        ("nothing", Trick(sends(b""))),
        ("silence", Trick(silence)),
        ("reset-at-once", Trick(reset(b""))),
        ("reset-in-head", Trick(reset(b"HTTP/1.1 200 OK\r\nContent-"))),
        ("reset-in-body", Trick(reset(http(WHOLE)[:-20]))),
        ("cut-head", Trick(sends(b"HTTP/1.1 200 OK\r\nContent-Le"))),
        ("cut-body", Trick(sends(http(WHOLE)[:-9]))),
        ("more-than-announced", Trick(sends(http(WHOLE, length=20)))),
        ("no-http", Trick(sends(b"220 mail ready\r\n"))),
        ("binary", Trick(sends(bytes(range(256)) * 16))),
        ("zeros", Trick(sends(bytes(4096)))),
        ("tls-alert", Trick(sends(b"\x15\x03\x01\x00\x02\x02\x46"))),
        ("http-0.9", Trick(sends(WHOLE))),
        ("http-3.7", Trick(sends(b"HTTP/3.7 200 OK\r\n\r\n"))),
        ("status-text", Trick(sends(b"HTTP/1.1 abc OK\r\n\r\n"))),
        ("status-99", Trick(sends(http(WHOLE, status="99 Low")))),
        ("status-999", Trick(sends(http(WHOLE, status="999 High")))),
        ("status-204", Trick(sends(b"HTTP/1.1 204 No Content\r\n\r\n"))),
        ("status-100-for-ever", Trick(endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.01))),
        ("length-negative", Trick(sends(http(WHOLE, length=-5)))),
        ("length-text", Trick(sends(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + WHOLE))),
        ("length-twice", Trick(sends(http(WHOLE, headers=("Content-Length: 7",))))),
        ("length-huge", Trick(sends(http(WHOLE, length=1 << 62)))),
        ("chunk-bad", Trick(sends(CHUNKED + b"zz\r\n" + WHOLE))),
        ("chunk-huge", Trick(sends(CHUNKED + b"ffffffffffffffff\r\n" + WHOLE))),
        ("chunk-cut", Trick(sends(CHUNKED + f"{len(WHOLE):x}\r\n".encode() + WHOLE + b"\r\n"))),
        ("chunk-good", Trick(sends(CHUNKED + f"{len(WHOLE):x}\r\n".encode() + WHOLE + b"\r\n0\r\n\r\n"), True)),
        ("gzip-lie", Trick(sends(http(WHOLE, headers=("Content-Encoding: gzip",))), None)),
        ("gzip-cut", Trick(sends(http(gzip.compress(WHOLE)[:-9], headers=("Content-Encoding: gzip",))), None)),
        ("gzip-good", Trick(sends(http(gzip.compress(WHOLE), headers=("Content-Encoding: gzip",))), True)),
        ("gzip-bomb", Trick(lambda connection, key: connection.sendall(http(bomb(2 << 30), headers=("Content-Encoding: gzip",))))),
        ("encoding-unknown", Trick(sends(http(WHOLE, headers=("Content-Encoding: lzma",))), None)),
        ("charset-unknown", Trick(sends(http(WHOLE, headers=("Content-Type: application/json; charset=klingon",))), None)),
        # Too much, too slow
        ("head-for-ever", Trick(endless(b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"a" * 1000 + b"\r\n"))),
        ("head-line-for-ever", Trick(endless(b"HTTP/1.1 200 OK\r\nX: ", b"a" * 65536))),
        ("reason-for-ever", Trick(endless(b"HTTP/1.1 200 ", b"a" * 65536))),
        ("body-for-ever", Trick(endless(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536))),
        ("chunks-for-ever", Trick(endless(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"))),
        ("body-1.5-GB", Trick(endless(http(b"", length=3 << 29), b"a" * 2**20, parts=1536))),
        ("error-body-1.5-GB", Trick(endless(http(b"", status="400 Bad", length=3 << 29), b"a" * 2**20, parts=1536))),
        ("byte-by-byte", Trick(endless(http(WHOLE, length=len(WHOLE))[: -len(WHOLE)], b" ", pause=0.2))),
        ("keep-alive-spaces", Trick(endless(CHUNKED, b"1\r\n \r\n", pause=0.2))),
        # Not an answer
        ("empty", Trick(sends(http(b"")))),
        ("html", Trick(sends(http("<html><body>Sign in</body></html>")))),
        ("not-utf-8", Trick(sends(http(b'{"choices": "\xff\xfe"}')))),
        ("utf-16", Trick(sends(http(json.dumps(body_of()).encode("utf-16"))), None)),
        ("bom", Trick(sends(http(b"\xef\xbb\xbf" + WHOLE)), None)),
        ("half-json", Trick(sends(http(WHOLE[:-3])))),
        ("two-json", Trick(sends(http(WHOLE + WHOLE)), None)),
        ("events", Trick(sends(http(b"data: " + WHOLE + b"\n\ndata: [DONE]\n\n")), None)),
        ("null", Trick(sends(http("null")))),
        ("number", Trick(sends(http("7")))),
        ("list", Trick(sends(http("[]")))),
        ("nan", Trick(sends(http("NaN")))),
        ("deep", Trick(sends(http(nested(200_000))))),
        ("deep-inside", Trick(sends(http(json.dumps(body_of())[:-1] + ', "x": ' + nested(100_000) + "}")), None)),
        ("huge-integer", Trick(sends(http(json.dumps(body_of())[:-1] + ', "x": ' + "9" * 10_000 + "}")), None)),
        ("keys-twice", Trick(sends(http(json.dumps(body_of())[:-1] + ', "choices": []}')), None)),
        ("error-in-200", Trick(sends(http({"error": {"message": "overloaded"}})))),
        ("error-text-in-200", Trick(sends(http({"error": "overloaded"})))),
        ("choices-none", Trick(sends(http(body_of(choices=None))))),
        ("choices-empty", Trick(sends(http(body_of(choices=[]))))),
        ("choices-map", Trick(sends(http(body_of(choices={"0": 1}))))),
        ("choices-of-null", Trick(sends(http(body_of(choices=[None]))))),
        ("choices-100000", Trick(sends(http(body_of(choices=[{"index": i} for i in range(100_000)]))))),
        ("message-none", Trick(sends(http(body_of(choice={"message": None}))))),
        ("message-list", Trick(sends(http(body_of(choice={"message": []}))))),
        in_content("content-number", 7),
        in_content("content-null", None, None),
        in_content("content-map", {"a": 1}),
        in_content("content-parts", [{"type": "text", "text": "yes"}], None),
        in_content("content-parts-odd", [None, 7, {"type": 9}, {"text": None}]),
        in_content("content-surrogate", "\ud800", None),
        in_content("content-null-byte", "a\0b", None),
        in_content("content-terminal", "\x1b]0;title\x07\x1b[2J\x1b[31m", None),
        in_content("content-markup", "[/INST] [red] [/bold]", True),
        in_content("content-20-MB", "a" * (20 << 20), None),
        in_finish("finish-null", None),
        in_finish("finish-empty", ""),
        in_finish("finish-number", 7),
        in_finish("finish-list", ["stop"]),
        in_finish("finish-map", {"a": "b"}),
        in_finish("finish-novel", "the\nend\x1b[31m" * 20_000),
        in_finish("finish-filter", "content_filter"),
        in_probabilities("probabilities-text", "high"),
        in_probabilities("probabilities-nan", {"content": [{"token": "a", "logprob": "NaN"}]}),
        in_probabilities("probabilities-null", {"content": [{"token": "a", "logprob": None}]}),
        in_probabilities("probabilities-positive", {"content": [{"token": "a", "logprob": 7.0}]}),
        in_probabilities("probabilities-odd", {"content": [None, 3, {}]}),
        in_probabilities("probabilities-huge", {"content": [{"token": "a", "logprob": 10**400}]}),
        ("usage-odd", Trick(sends(http(body_of(usage=[1, 2]))), None)),
        ("usage-huge", Trick(sends(http(body_of(usage={"prompt_tokens": 10**30, "completion_tokens": 10**30}))), None)),
        ("usage-negative", Trick(sends(http(body_of(usage={"prompt_tokens": -1, "completion_tokens": -1}))), None)),
        ("usage-float", Trick(sends(http(body_of(usage={"prompt_tokens": 1e300, "completion_tokens": 1}))), None)),
        # Statuses and headers
        *((f"status-{code}", Trick(sends(http("no", status=f"{code} No")))) for code in (400, 401, 403, 404, 408, 409, 413, 418, 422, 429, 500, 502, 503, 504, 529)),
        *(
            (f"retry-after-{name}", Trick(sends(http("wait", status="429 Wait", headers=(f"Retry-After: {value}",)))))
            for name, value in (
                ("huge", "9" * 400), ("negative", "-5"), ("text", "soon"), ("date", "Thu, 01 Jan 9999 00:00:00 GMT"),
                ("bad-date", "Thu, 99 Jan 99999 00:00:00 GMT"), ("infinite", "inf"), ("nan", "nan"), ("float", "1e-9"),
            )
        ),
        ("redirect-itself", Trick(sends(http("", status="302 Found", headers=("Location: /redirect-itself/v1/chat/completions",))))),
        ("redirect-file", Trick(sends(http("", status="302 Found", headers=("Location: file:///etc/passwd",))))),
        ("redirect-nowhere", Trick(sends(http("", status="307 Temporary")))),
        ("redirect-long", Trick(sends(http("", status="308 Permanent", headers=("Location: http://h/" + "a" * 60_000,))))),
        ("header-latin", Trick(sends(http("no", status="400 Bad", headers=("X-\udcff: \udcfe",))))),
        ("cookie", Trick(sends(http(body_of(), headers=("Set-Cookie: a=b; Domain=.com",))), True)),
        # The key comes back
        with_key("in-content", http(body_of(choice={"message": {"role": "assistant", "content": "@KEY"}}).copy())),
        with_key("in-error", http('{"error": {"message": "bad key @KEY"}}', status="401 No")),
        with_key("in-error-200", http('{"error": {"message": "bad key @KEY"}}')),
        with_key("in-error-cut", http("x" * 285 + "@KEY", status="400 No")),
        with_key("in-error-cut-list", http(json.dumps({"detail": ["x" * 280 + "@KEY"]}), status="422 No")),
        with_key("escaped", http('{"error": {"message": "' + "".join(f"\\u{ord(c):04x}" for c in KEY) + '"}}', status="401 No")),
        with_key("spaced", http("bad " + KEY[:15] + "\n" + KEY[15:], status="401 No")),
        with_key("in-location", http("", status="302 Found", headers=("Location: http://h/@KEY",))),
        with_key("in-location-quoted", http("", status="302 Found", headers=("Location: http://h/?k=" + "".join(f"%{ord(c):02x}" for c in KEY),))),
        with_key("in-reason", http("no", status="400 @KEY")),
        with_key("in-status-line", b"HTTP/1.1 @KEY\r\n\r\n"),
        with_key("in-http-version", b"@KEY 200 OK\r\n\r\n"),
        with_key("in-header-name", http(WHOLE, headers=("@KEY\x01: a",))),
        with_key("in-retry-after", http("no", status="429 Wait", headers=("Retry-After: @KEY",))),
        with_key("in-encoding", http(WHOLE, headers=("Content-Encoding: @KEY",))),
        with_key("in-type", http(WHOLE, headers=("Content-Type: @KEY",))),
        with_key("in-length", b"HTTP/1.1 200 OK\r\nContent-Length: @KEY\r\n\r\n"),
        with_key("in-chunk", CHUNKED + b"@KEY\r\n"),
        with_key("in-finish", http(body_of(choice={"finish_reason": "@KEY"}))),
        with_key("in-finish-list", http(body_of(choice={"finish_reason": ["@KEY"]}))),
        with_key("in-message", http(body_of(choice={"message": "@KEY"}))),
        with_key("in-probabilities", http(body_of(choice={"logprobs": {"content": [{"token": "@KEY", "logprob": "@KEY"}]}}))),
        with_key("in-usage", http(body_of(usage={"prompt_tokens": "@KEY"}))),
        with_key("in-bad-json", http('{"@KEY": ')),
        with_key("in-id", http(body_of(id="@KEY", model="@KEY"))),
        with_key("twice", http("@KEY@KEY" * 30, status="500 No")),
        with_key("upper", http(KEY.upper(), status="400 No")),
        with_key("bearer", http("Bearer @KEY", status="403 No")),
    ]
)  # fmt: skip


def serve_one(connection: Connection) -> None:
    """Read a request and behave as its path says."""
    with connection, contextlib.suppress(OSError):
        connection.settimeout(4 * PATIENCE)
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(65536)
        head, _, body = request.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        while length and len(body) < int(length[1]):
            body += connection.recv(65536)
        found = re.match(rb"POST /([^/]+)/", head)
        key = re.search(rb"(?i)authorization: bearer ([^\r\n]+)", head)
        if found:
            TRICKS[found[1].decode()].behave(connection, key[1].decode() if key else "")
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(0.2)
            while connection.recv(65536):
                pass


def ask(address: str) -> Callable[[], None]:
    """Run a client process: one request, the response printed."""

    def act() -> None:
        import os
        import sys
        from pathlib import Path

        from koine.errors import UserError
        from koine.generate.remote.engine import RemoteEngine
        from koine.generate.remote.retry import RetryPolicy
        from koine.generate.sampling import Sampling

        os.environ["KOINE_FAULTS_KEY"] = KEY
        try:
            engine = RemoteEngine(
                address, "m", api_key_variable="KOINE_FAULTS_KEY", cache=Path("cache"), timeout=PATIENCE,
                retries=RetryPolicy(attempts=2, first_wait=0.01, longest_wait=0.05),
            )  # fmt: skip
            [answer] = engine.generate([[{"role": "user", "content": "well?"}]], Sampling(temperature=0.0))
        except UserError as error:
            print(f"koine: {error}", file=sys.stderr)
            sys.exit(2)
        print(repr(answer))

    return act


def shown(text: str) -> Iterator[str]:
    """Yield forms of the key, or of most of it, that a text contains."""
    plain = re.sub(r"\s+", "", text)
    for form in (text, plain, text.replace("\\", ""), plain.lower()):
        for size in (len(KEY), 16):
            if KEY[:size] in form or KEY[-size:] in form or KEY[:size].lower() in form:
                yield KEY[:size]


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)
    while True:
        accepted, _ = listener.accept()
        threading.Thread(target=serve_one, args=(accepted,), daemon=True).start()
