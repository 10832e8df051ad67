"""`koine chat` on models with and without a chat template."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch

from koine.cli.main import main
from koine.generate import LocalEngine, Sampling
from tests.generate.conftest import model_folder as model_folder

GREEDY = ["--temperature", "0", "--max-new-tokens", "8", "--dtype", "float32"]


Chat = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Run `koine chat`; return the exit code, standard output, and the lines of standard error."""

    def run(*arguments: str, given: str = "") -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["koine", "chat", *arguments])
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(given.encode())))
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


@pytest.fixture(scope="module")
def base(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX without a chat template, which puts no token before a text."""
    transformers = pytest.importorskip("transformers", reason="the class needs the extra [hf]")
    folder = tmp_path_factory.mktemp("base")
    tokenizer = LocalEngine(model_folder).tokenizer
    config = transformers.GPTNeoXConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "chat_template.jinja").unlink()
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    return folder


def test_without_a_template_the_message_names_complete(base: Path, chat: Chat) -> None:
    assert chat(str(base), "--once", "Hallo") == (
        2,
        "",
        [
            f"koine: {base}: no chat template: a base model continues text; "
            "use --complete, or add a chat_template.jinja to the folder"
        ],
    )


def test_complete_continues_raw_text_as_transformers_does(base: Path, chat: Chat) -> None:
    """One text with `--once`, several by standard input, each by itself."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    inner = transformers.AutoModelForCausalLM.from_pretrained(base)
    engine, texts = LocalEngine(base), ["Der Fluss ", "Das Haus steht"]
    expected = []
    for text in texts:
        prompt = tokenizer(text, return_tensors="pt").input_ids
        assert prompt[0].tolist() == engine.encode_text(text)
        stops = sorted(engine.stop_ids)
        out = inner.generate(prompt, do_sample=False, max_new_tokens=8, eos_token_id=stops)
        expected.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
    assert chat(str(base), "--complete", "--once", texts[0], *GREEDY)[:2] == (0, expected[0] + "\n")
    several = chat(str(base), "--complete", *GREEDY, given="".join(text + "\n" for text in texts))
    assert several[:2] == (0, "".join(text + "\n" for text in expected))


def test_complete_works_where_there_is_a_template(model_folder: Path, chat: Chat) -> None:
    """The raw text follows BOS, as in the documents of the training."""
    engine = LocalEngine(model_folder, dtype="float32")
    prompt = engine.encode_text("Der Fluss")
    assert prompt == [engine.tokenizer.bos_id, *engine.tokenizer.encode("Der Fluss")]
    sampling = Sampling(temperature=0, max_new_tokens=8)
    [completion] = engine.complete(["Der Fluss"], sampling)
    assert list(completion.tokens) == [token.id for token in engine.stream(prompt, sampling)]
    assert "".join(engine.stream_text("Der Fluss", sampling)) == completion.text
    continued = chat(str(model_folder), "--complete", "--once", "Der Fluss", *GREEDY)
    assert continued[:2] == (0, completion.text + "\n")
    code, answer, _ = chat(str(model_folder), "--once", "Der Fluss", *GREEDY)
    assert code == 0
    assert answer != continued[1]


def test_a_system_prompt_needs_a_chat(model_folder: Path, chat: Chat) -> None:
    code, _, [line] = chat(str(model_folder), "--complete", "--system", "Kurz.", "--once", "Hallo")
    assert code == 2
    assert "--system needs a chat; write it into the text" in line


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no tools') }}", "the chat template refuses these messages (no tools)"),
        ("{% for %}", "the chat template refuses these messages (Expected an expression"),
        ("{{ 1 / 0 }}", "the chat template fails (ZeroDivisionError"),
        (LOOP, "the chat template takes more than 0.3"),
        ("{{ 'a' * 10 ** 10 }}", "the chat template makes a text of more than"),
        ("{{ '\\ud800' }}", "the text is not valid Unicode"),
        ("{{ messages[0].nothing }}", "a prompt is empty"),
    ],
)
def test_a_template_that_fails_or_loops_is_one_line(
    template: str, words: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: Chat
) -> None:
    """It costs no traceback, and `--complete` goes without it."""
    monkeypatch.setattr("koine.tokenizer.template_limits.SECONDS", 0.3)
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    code, _, [line] = chat(str(tmp_path / "model"), "--once", "Hallo")
    assert code == 2
    assert words in line
    assert chat(str(tmp_path / "model"), "--complete", "--once", "Hallo", *GREEDY)[0] == 0
