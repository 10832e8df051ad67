"""Code that comes with a model is never run, and folders with code are refused."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from koine.errors import UserError

ROOT = Path(__file__).parents[1]
ROOMS = ("src", "benchmarks", "experiments")
OPENING = {
    "from_pretrained",
    "from_config",
    "SentenceTransformer",
    "CrossEncoder",
    "pipeline",
    "get_class_from_dynamic_module",
}
"""What of `transformers` and its relatives can run code of a folder."""
OURS = {"KoineConfig"}
"""A class of ours by name: nothing is looked up in a folder."""


def openings(path: Path) -> list[ast.Call]:
    """The calls in a file that open something by a method or function of `OPENING`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        owner = function.value if isinstance(function, ast.Attribute) else None
        if name in OPENING and not (isinstance(owner, ast.Name) and owner.id in OURS):
            found.append(node)
    return found


def refuses_code(call: ast.Call) -> bool:
    return any(
        keyword.arg == "trust_remote_code"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is False
        for keyword in call.keywords
    )


def test_every_opening_refuses_code_itself() -> None:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    calls = [(path.relative_to(ROOT), call) for path in files for call in openings(path)]
    assert len(calls) >= 7
    wrong = [f"{path}:{call.lineno}" for path, call in calls if not refuses_code(call)]
    assert not wrong, f"without trust_remote_code=False: {wrong}"


def test_nothing_trusts_code_anywhere() -> None:
    """Neither by a keyword nor by a dictionary of arguments or a variable of the environment."""
    for room in (*ROOMS, "tests"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.name == Path(__file__).name:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert isinstance(node.value, ast.Constant), path
                    assert node.value.value is False, path
                if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
                    raise AssertionError(f"{path}:{node.lineno}")


def test_a_call_without_it_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import transformers as t\nt.AutoModel.from_pretrained('x')\nt.AutoModel.from_pretrained('x', trust_remote_code=True)\n"
        "SentenceTransformer('x', trust_remote_code=False)\n"
    )
    assert [refuses_code(call) for call in openings(tmp_path / "a.py")] == [False, False, True]


def spy(folder: Path, name: str) -> None:
    """A module that leaves a file where it runs."""
    (folder / f"{name}.py").write_text(
        f"open({str(folder.parent / 'it-ran')!r}, 'w').close()\nclass C: pass\n"
    )


def test_a_tokenizer_with_code_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from koine.tokenizer.loaders import open_tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    about = {"tokenizer_class": "FancyTokenizer", "auto_map": {"AutoTokenizer": ["fancy.C", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    spy(folder, "fancy")
    with pytest.raises(
        UserError, match=r"needs Python code that comes with it \(fancy\.C\), which is never run"
    ):
        open_tokenizer(folder)
    assert not (tmp_path / "it-ran").exists()


def test_a_sentence_encoder_with_code_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from koine.combine.moe.domain_embeddings import SentenceEncoder

    folder = tmp_path / "encoder"
    folder.mkdir()
    modules = [{"idx": 0, "name": "0", "path": "", "type": "fancy.C"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    spy(folder, "fancy")
    with pytest.raises(
        UserError, match=r"needs Python code that comes with it \(fancy\.C\), which is never run"
    ):
        SentenceEncoder(folder)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("kind", ["llama", "fancylm"])
def test_code_of_a_model_is_never_run(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A model that brings code is refused by the code's name, also where a class of ours has its `model_type`.

    Only its code says what it computes. Nothing is asked on the terminal.
    """
    transformers = pytest.importorskip("transformers")
    from koine.model import load_causal_lm

    folder = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("configuration_fancy", "modeling_fancy"):
        spy(folder, name)
    code = {"AutoConfig": "configuration_fancy.C", "AutoModelForCausalLM": "modeling_fancy.C"}
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(value | {"model_type": kind, "auto_map": code}))
    with pytest.raises(
        UserError, match=r"needs Python code .* \(configuration_fancy\.C, modeling_fancy\.C\)"
    ):
        load_causal_lm(folder)
    assert not (tmp_path / "it-ran").exists()
    assert "[y/N]" not in "".join(capfd.readouterr())
