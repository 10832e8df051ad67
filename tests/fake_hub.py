"""A hub on localhost: what `huggingface_hub` asks for, answered from folders of this machine."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repository>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^?]+))?"
)
FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)"
)


@dataclass
class FakeHub:
    """Repositories by kind and name ("models/OWNER/NAME"), each a folder by revision.

    `gated` holds names that nobody may read without `token`; `requests` lists the paths that were asked for.
    """

    endpoint: str = ""
    folders: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_of_the_tests"
    requests: list[str] = field(default_factory=list)

    def add(self, kind: str, repository: str, folder: Path, revision: str = "main") -> None:
        """Publish a folder."""
        self.folders.setdefault(f"{kind}/{repository}", {})[revision] = folder

    def folder(self, name: str, revision: str) -> tuple[Path, str] | None:
        """Return the folder and the commit of a revision, named by branch or by commit."""
        for branch, folder in self.folders.get(name, {}).items():
            commit = hashlib.sha1(f"{name}@{branch}".encode()).hexdigest()
            if revision in (branch, commit):
                return folder, commit
        return None


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(path)
        if found := API.fullmatch(path):
            self._api(found)
        elif found := FILE.fullmatch(path):
            self._file(found)
        else:
            self._answer(404, b"")

    def _repository(self, name: str, revision: str) -> tuple[Path, str] | None:
        """Return the folder and the commit, or send the hub's error."""
        if name not in self.hub.folders:
            # As the hub does for those who are not logged in: it does not say whether the repository exists.
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        found = self.hub.folder(name, revision)
        if found is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return found

    def _api(self, found: re.Match[str]) -> None:
        name = f"{found['kind']}/{found['repository']}"
        there = self._repository(name, found["revision"] or "main")
        if there is None:
            return
        folder, commit = there
        if found["what"] == "tree":
            listing = [
                {
                    "type": "file",
                    "path": file,
                    "size": (folder / file).stat().st_size,
                    "oid": _etag(folder / file),
                }
                for file in _files(folder)
            ]
            self._json(listing)
        else:
            siblings = [{"rfilename": file} for file in _files(folder)]
            self._json({"id": found["repository"], "sha": commit, "siblings": siblings, "tags": []})

    def _file(self, found: re.Match[str]) -> None:
        name = f"{'datasets' if found['kind'] else 'models'}/{found['repository']}"
        there = self._repository(name, found["revision"])
        if there is None:
            return
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if name in self.hub.gated and not allowed:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        folder, commit = there
        file = folder / found["file"]
        if not file.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        self._answer(200, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_etag(file)}"'})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def point_client(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Let the client of this process ask `endpoint` and keep its cache below `home`."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Serve an empty hub until the end of the block."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
