"""Names on the hub: which words are names, what is fetched, and what the errors say.

The client is the real one, and the hub a server on localhost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from koine import hub
from koine.errors import UserError
from koine.model import Decoder, load_causal_lm, preset, save_model
from koine.tokenizer import load_tokenizer, train_tokenizer

from . import fake_hub

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as the hub holds it, with files that nobody needs."""
    folder = tmp_path_factory.mktemp("model")
    texts: dict[str, Any] = {"en": lambda: ["A river runs to the sea, 12 miles long. "] * 10}
    train_tokenizer(texts, vocab_size=310, english_share=None).save(folder)
    torch.manual_seed(0)
    save_model(Decoder(preset("koine-0.5m", 310)), folder, tokenizer=folder)
    (folder / "README.md").write_text("a card")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def served(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    monkeypatch.chdir(tmp_path)
    with fake_hub.serve() as server:
        server.add("models", "org/tiny", model)
        server.add("models", "org/gated", model)
        server.gated.add("models/org/gated")
        fake_hub.point_client(monkeypatch, server.endpoint, tmp_path)
        yield server


@pytest.mark.parametrize(
    ("text", "repository", "revision", "part"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", None, None),
        ("org/name@v1.0", "org/name", "v1.0", None),
        ("org/name@refs/convert/parquet:de", "org/name", "refs/convert/parquet", "de"),
        ("org/name:data/*.jsonl", "org/name", None, "data/*.jsonl"),
        ("hub:org/name@main", "org/name", "main", None),
        ("hf://datasets/org/name", "org/name", None, None),
        ("hf://org/name", "org/name", None, None),
    ],
)
def test_names(text: str, repository: str, revision: str | None, part: str | None) -> None:
    for given in (text, Path(text)):
        found = hub.hub_name(given)
        assert found is not None
        assert (found.repository, found.revision, found.part) == (repository, revision, part)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "./org/name",
        "/org/name",
        "a/b/c",
        "data/train.jsonl",
        "data/train.jsonl.xz",
        "../name",
        "",
        "a/",
    ],
)
def test_local_paths(text: str) -> None:
    assert hub.hub_name(text) is None


def test_what_exists_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "link").symlink_to("nowhere")
    assert hub.model_folder("org/name") == Path("org/name")
    assert hub.hub_name("org/link") is None


def test_the_files_of_a_model_are_fetched_once(served: fake_hub.FakeHub, model: Path) -> None:
    folder = hub.model_folder("org/tiny")
    found = sorted(path.name for path in folder.rglob("*"))
    unneeded = {"README.md", "consolidated.safetensors", "onnx", "pytorch_model.bin"}
    assert found == sorted({path.name for path in model.iterdir()} - unneeded)
    assert hub.shown_name(folder).startswith("org/tiny@")
    assert hub.shown_name(model) == str(model)
    before = len([path for path in served.requests if "/resolve/" in path])
    assert hub.model_folder("org/tiny") == folder
    assert len([path for path in served.requests if "/resolve/" in path]) == before
    expected, fetched = load_causal_lm(model), load_causal_lm(Path("org/tiny"))
    for one, other in zip(expected.parameters(), fetched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_a_tokenizer_or_a_configuration_is_fetched(served: fake_hub.FakeHub, model: Path) -> None:
    assert load_tokenizer("org/tiny").fingerprint == load_tokenizer(model).fingerprint
    folder = hub.model_folder("org/tiny", hub.CONFIGURATION)
    assert not (folder / "model.safetensors").exists()


def test_pickles_are_fetched_where_there_is_nothing_else(served: fake_hub.FakeHub, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    (old / "pytorch_model.bin").write_bytes(b"a pickle")
    served.add("models", "org/old", old)
    assert (hub.model_folder("org/old") / "pytorch_model.bin").is_file()


def test_revisions(served: fake_hub.FakeHub, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"of": "v2"}')
    served.add("models", "org/tiny", other, revision="v2")
    folder = hub.model_folder("org/tiny@v2", hub.CONFIGURATION)
    assert json.loads((folder / "config.json").read_text()) == {"of": "v2"}
    with pytest.raises(
        UserError,
        match=r"org/tiny@v3: no such local path, and the model 'org/tiny' on the hub has no revision 'v3'",
    ):
        hub.model_folder("org/tiny@v3")


def test_errors_name_both_readings(served: fake_hub.FakeHub, tmp_path: Path) -> None:
    (tmp_path / "runs" / "model").mkdir(parents=True)
    log_in = "`hf auth login`, or the variable HF_TOKEN"
    for name, line in {
        "org/none": f"org/none: no such local path, and the hub has no model 'org/none'; check the name; log in to see a private one: {log_in}",
        "runs/modle": f"runs/modle: no such local path, and the hub has no model 'runs/modle'; did you mean 'model'? Or check the name; log in to see a private one: {log_in}",
        "hub:org/none": f"hub:org/none: the hub has no model 'org/none'; check the name; log in to see a private one: {log_in}",
        "org/gated": f"org/gated: no such local path, and the model 'org/gated' on the hub is gated; ask for access at {served.endpoint}/org/gated and log in: {log_in}",
        "org/tiny:de": "org/tiny:de: 'de' after the colon: a model has no subsets; give org/tiny",
        "hub:tiny": "'hub:tiny' is no name on the hub; write OWNER/NAME, or OWNER/NAME@REVISION",
    }.items():
        with pytest.raises(UserError) as caught:
            hub.model_folder(name)
        assert str(caught.value) == line


def test_a_token_opens_a_gated_model(served: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", served.token)
    assert (hub.model_folder("org/gated") / "model.safetensors").is_file()


def test_without_a_connection_the_cache_is_used(
    served: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = hub.model_folder("org/tiny")
    fake_hub.point_client(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert hub.model_folder("org/tiny") == folder
    with pytest.raises(
        UserError,
        match=r"org/new: no such local path, and the model 'org/new' cannot be fetched from the hub \(.*\); "
        r"check the connection to http://127.0.0.1:9, or give a local path",
    ):
        hub.model_folder("org/new")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.model_folder("org/tiny") == folder
    with pytest.raises(
        UserError, match=r"the cache does not hold the model 'org/new', and HF_HUB_OFFLINE is set"
    ):
        hub.model_folder("org/new")


def test_an_error_without_a_message_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot be fetched from the hub \(ConnectionError\)"):
        hub.model_folder("org/name")


def test_the_command_line(served: fake_hub.FakeHub, tmp_path: Path) -> None:
    def koine(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "HF_ENDPOINT": served.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            **variables,
        }
        return subprocess.run(
            [sys.executable, "-m", "koine", *words],
            capture_output=True, text=True, check=False, env=environment, cwd=tmp_path, timeout=300,
        )  # fmt: skip

    chat = ("chat", "org/tiny", "--once", "Hello", "--max-new-tokens", "2", "--seed", "0")
    online = koine(*chat)
    assert online.returncode == 0, online.stderr
    offline = koine(*chat, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert (offline.returncode, offline.stdout) == (0, online.stdout)
    refused = koine("chat", "org/gated", "--once", "Hello")
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "koine: org/gated: no such local path, and the model 'org/gated' on the hub is gated"
    )
    assert refused.stderr.count("\n") == 1
