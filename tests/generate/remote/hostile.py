"""A server that speaks HTTP by hand and wishes ill: run as a script it is a process of its own.

The last message of a conversation names what it does (`SCRIPTS`). It knows the key of the request and sends
it back in every place and spelling that it can think of. `GET /count` tells how many requests have come.
"""

from __future__ import annotations

import base64
import gzip
import json
import socketserver
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

Chunks = Iterator[bytes]


def response(
    body: bytes, *, status: str = "200 OK", headers: str = "Content-Type: application/json"
) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\n{headers}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        + body
    )


def error(message: str, status: str = "400 Bad Request") -> Chunks:
    yield response(json.dumps({"error": {"message": message}}).encode(), status=status)


def plain(body: str, status: str = "400 Bad Request") -> Chunks:
    yield response(body.encode(), status=status, headers="Content-Type: text/plain")


def answer(content: str = "Nine lamps.", finish: Any = "stop", **more: Any) -> bytes:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": finish}
    return json.dumps({"choices": [choice], **more}).encode()


def endless(piece: bytes, pause: float = 0.0, first: bytes = b"", headers: str = "") -> Chunks:
    yield (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        + headers.encode()
        + b"Connection: close\r\n\r\n"
        + first
    )
    while True:
        yield piece
        time.sleep(pause)


@cache
def bomb() -> bytes:
    """400 MB of spaces in 400 KB."""
    packer = zlib.compressobj(1, wbits=16 + zlib.MAX_WBITS)
    return b"".join([*(packer.compress(b" " * (1 << 20)) for _ in range(400)), packer.flush()])


def escaped(key: str) -> str:
    return "".join(f"\\u{ord(letter):04x}" for letter in key)


# What the key is shown in; each gets the key.
SCRIPTS: dict[str, Callable[[str], Chunks]] = {
    "message": lambda key: error(f"wrong key {key}", "401 Unauthorized"),
    "status line": lambda key: iter([response(b"", status=f"401 no {key}", headers=f"X-Key: {key}")]),
    "redirect": lambda key: iter(
        [response(b"", status="307 Moved", headers=f"Location: http://u:{key}@evil.example/{key}?k={key}")]
    ),
    "redirect to no address": lambda key: iter(
        [response(b"", status="307 Moved", headers=f"Location: http://[{key}")]
    ),
    "finish": lambda key: iter([response(answer(finish=f"content_filter {key}"))]),
    "strange finish": lambda key: iter([response(answer(finish=f"x{key}"))]),
    "answer": lambda key: iter([response(answer(f"Your key is {key}."))]),
    "answer in base64": lambda key: iter(
        [response(answer(base64.b64encode(b"Bearer " + key.encode()).decode()))]
    ),
    "cut in the key": lambda key: error("x" * (300 - len(key) // 2) + key),
    "much text, cut in the key": lambda key: plain(" " * (65536 - len(key) // 2 - 1) + "!" + key + "y" * 1000),
    "percent": lambda key: plain("".join(f"%{ord(letter):02X}" for letter in key)),
    "escaped": lambda key: plain(escaped(key)),
    "escaped twice": lambda key: error(escaped(key)),
    "upper case": lambda key: error(key.upper()),
    "lines": lambda key: error("\n".join(key)),
    "base64": lambda key: error(base64.b64encode(key.encode()).decode()),
    "half": lambda key: error(f"it begins with {key[:12]}"),
    "retry after": lambda key: iter([response(b"", status="429 Slow", headers=f"Retry-After: {key}")]),
    "header line": lambda key: iter([f"HTTP/1.1 200 OK\r\n{key} x\r\n\r\n".encode()]),
    "no HTTP": lambda key: iter([f"{key}\r\n\r\n".encode()]),
    "encoding": lambda key: iter([response(b"x", headers=f"Content-Encoding: {key}")]),
    "charset": lambda key: iter(
        [response(b"\xff", headers=f"Content-Type: application/json; charset={key}")]
    ),
    "cookie": lambda key: iter([response(b"<html>", headers=f"Set-Cookie: {key}={key}; Domain={key}")]),
    "error inside": lambda key: iter(
        [response(json.dumps({"error": {"message": key, "code": key}}).encode())]
    ),
    "no JSON": lambda key: iter([response(f'{{"{key}": {key}'.encode())]),
    "part of another kind": lambda key: iter(
        [response(json.dumps({"choices": [{"message": {"content": [[key]]}}]}).encode())]
    ),
    "terminal": lambda key: error(f"\x1b]0;{key}\x07\x1b[31mred\u202e\u2066\x9b2J"),
    # size and time
    "endless": lambda key: endless(b" " * 65536),
    "endless refusal": lambda key: iter(
        [b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", *[b"no " * 20000] * 200]
    ),
    "drip": lambda key: endless(b" ", 0.05),
    "bomb": lambda key: iter([response(bomb(), headers="Content-Encoding: gzip")]),
    "endless header": lambda key: endless(b"", headers="X-A: b\r\n" * 100_000),
    # what good servers do, too
    "HTTP/1.0": lambda key: iter([b"HTTP/1.0 200 OK\r\n\r\n" + answer()]),
    "created": lambda key: iter([response(answer(), status="201 Created")]),
    "chunked": lambda key: iter(
        [
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
            *[b"1\r\n" + answer()[place : place + 1] + b"\r\n" for place in range(len(answer()))],
            b"0\r\n\r\n",
        ]
    ),
    "gzip": lambda key: iter([response(gzip.compress(answer()), headers="Content-Encoding: gzip")]),
    "two gzips": lambda key: iter(
        [response(gzip.compress(answer()[:9]) + gzip.compress(answer()[9:]), headers="Content-Encoding: gzip")]
    ),
    "said to be packed": lambda key: iter([response(answer(), headers="Content-Encoding: gzip")]),
    "waiting lines": lambda key: iter([response(b": OPENROUTER PROCESSING\n\n" * 3 + answer())]),
    "blank lines": lambda key: iter([response(b"\n         \n" * 50 + answer())]),
    "UTF-16": lambda key: iter([response(answer().decode().encode("utf-16"))]),
    "latin-1": lambda key: iter(
        [
            response(
                '{"choices":[{"message":{"content":"Größe"},"finish_reason":"stop"}]}'.encode("latin-1"),
                headers="Content-Type: application/json; charset=iso-8859-1",
            )
        ]
    ),
    "ill UTF-8": lambda key: iter([response(answer().replace(b"lamps", b"lam\xffps"))]),
}  # fmt: skip


class Handler(socketserver.StreamRequestHandler):
    timeout = 30

    def handle(self) -> None:
        first = self.rfile.readline().decode("latin-1")
        headers = {}
        while (line := self.rfile.readline().decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        server: Any = self.server
        if first.startswith("GET"):
            self.wfile.write(response(str(server.count).encode()))
            return
        body = json.loads(self.rfile.read(int(headers.get("content-length", "0"))))
        server.count += 1
        key = headers.get("authorization", "").removeprefix("Bearer ")
        try:
            for chunk in SCRIPTS[body["messages"][-1]["content"]](key):
                self.wfile.write(chunk)
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            pass


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64
    count = 0


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
