"""An OpenAI-compatible server that misbehaves on request; run as a script it is a process of its own.

It answers a conversation whose last message is C with `C|SEED|N` where this is the N-th time that C is asked.
`POST /control` with `{"plans": {C: [STEP, ...]}, "key": K}` says how the first requests for C go (then they
go well) and which key is wanted. A step holds any of

    status, headers, body   answer with these (`body` is sent as it is, with status 200 where none is given)
    drop                    close the connection with no answer
    cut                     announce the whole answer and send half of it
    hang                    answer only when `POST /control` says `{"release": true}`
    meet                    answer when so many requests are here at once
    finish, usage, content, logprobs    replace these parts of the answer

`{"reset": true}` forgets everything. `GET /seen` tells the requests so far and how many were here at once at
most.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE_SECONDS = 60.0


class State:
    """What all connections share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.plans: dict[str, list[dict[str, Any]]] = {}
        self.key: str | None = None
        self.released = False
        self.requests: list[dict[str, Any]] = []
        self.asked: dict[str, int] = {}
        self.here = 0
        self.most_at_once = 0


class Current:
    """The state of the test that runs; `{"reset": true}` begins a new one."""

    state = State()


def answer(body: dict[str, Any], step: dict[str, Any], count: int) -> dict[str, Any]:
    question = body["messages"][-1]["content"]
    text = f"{question}|{body.get('seed')}|{count}"
    log_probabilities = (
        [{"token": letter, "logprob": -0.5} for letter in text] if body.get("logprobs") else None
    )
    return {
        "id": "x",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": step.get("content", text)},
                "logprobs": step.get("logprobs", {"content": log_probabilities}),
                "finish_reason": step.get("finish", "stop"),
            }
        ],
        "usage": step.get("usage", {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}),
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def do_GET(self) -> None:
        state = Current.state
        with state.changed:
            seen = {"requests": state.requests, "most_at_once": state.most_at_once}
            self.reply(200, json.dumps(seen).encode())

    def do_POST(self) -> None:
        state = Current.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            with state.changed:
                if body.get("reset"):
                    Current.state = State()
                    state.released = True
                state.plans.update(body.get("plans", {}))
                state.key = body.get("key", state.key)
                state.released = state.released or body.get("release", False)
                state.changed.notify_all()
            self.reply(200, b"{}")
            return
        with state.changed:
            state.here += 1
            state.most_at_once = max(state.most_at_once, state.here)
            state.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
            question = body["messages"][-1]["content"]
            state.asked[question] = count = state.asked.get(question, 0) + 1
            plan = state.plans.get(question, [])
            step = plan.pop(0) if plan else {}
            state.changed.notify_all()
            if "meet" in step:
                state.changed.wait_for(lambda: state.most_at_once >= step["meet"], PATIENCE_SECONDS)
            if step.get("hang"):
                state.changed.wait_for(lambda: state.released, PATIENCE_SECONDS)
            # It is gone from here before the client can know of the answer and send the next one.
            state.here -= 1
        if step.get("drop"):
            self.close_connection = True
        elif state.key is not None and self.headers.get("Authorization") != f"Bearer {state.key}":
            message = f"Incorrect API key provided: {self.headers.get('Authorization')}"
            self.reply(401, json.dumps({"error": {"message": message, "type": "auth"}}).encode())
        elif "status" in step or "body" in step:
            self.reply(step.get("status", 200), step.get("body", "{}").encode(), step.get("headers"))
        else:
            self.reply(200, json.dumps(answer(body, step, count)).encode(), cut=step.get("cut", False))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """A client that has gone away is no news."""


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
