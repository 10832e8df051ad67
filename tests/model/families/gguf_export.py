"""Export a family's checkpoint to GGUF, and let llama.cpp and `transformers` compute it.

The checkpoints are those of the other columns with a tokenizer, a longer context and longer windows, and
where llama.cpp fixes a number that the case chose otherwise, its number (`FIXED_BY_LLAMA_CPP`).
"""

from __future__ import annotations

import functools
import json
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from koine.errors import KoineWarning
from koine.generate import generate
from koine.generate.sampling import Sampling
from koine.model import load_model
from koine.model.formats.gguf import export_gguf
from koine.tokenizer import Tokenizer, train_tokenizer

from .cases import Case
from .checks import NEW_TOKENS
from .reference import write_checkpoint

PEER = Path(__file__).parents[3] / ".venv-peers" / "llama_cpp" / "bin" / "python"
PEER_SCRIPT = Path(__file__).parents[1] / "formats" / "llama_cpp_peer.py"
CONTEXT = 256
WINDOW = 40
PROMPTS = (5, 8, 60, 150)
"""Lengths of prompts: the last two are longer than the window. Those that do not fit the file's context are
left out."""
LLAMA_CPP: dict[str, float] = {"silu": 2e-5, "gelu_tanh": 5e-3}
"""Largest error of llama.cpp's logits by activation, relative to the largest logit.

Its exponential is a vectorised one, and its GELU a table of float16.
"""
FIXED_BY_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "head_dim": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "head_dim": 16},
}
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2")
"""Families whose files the reader of `transformers` takes."""


@functools.cache
def tokenizer() -> Tokenizer:
    """Return a small byte-level tokenizer."""
    texts = ["The quick brown fox jumps over the lazy dog. ", "Der Fluß fließt.", "東京 12 345"]
    return train_tokenizer(
        {"en": lambda: [text * 4 for text in texts]},
        vocab_size=330,
        scheme="natural",
        english_share=None,
        min_frequency=1,
    )


def with_tokenizer(case: Case) -> Case:
    """Return a case whose checkpoint fits the tokenizer, and has room for prompts and new tokens."""
    ours = tokenizer()
    changes = {
        "max_position_embeddings": CONTEXT,
        **case.changes,
        **FIXED_BY_LLAMA_CPP.get(case.model_type, {}),
        "vocab_size": ours.vocab_size + 3,
        "pad_token_id": ours.pad_id,
        "bos_token_id": ours.bos_id,
        "eos_token_id": ours.eos_id,
    }
    if changes.get("sliding_window") is not None:
        changes["sliding_window"] = WINDOW
    return replace(case, changes=changes)


def exported(case: Case, work: Path) -> tuple[Path, Path]:
    """Return a checkpoint's folder with its tokenizer, and the float32 GGUF file of it."""
    folder, out = work / "model", work / "file" / "model.gguf"
    write_checkpoint(with_tokenizer(case), folder)
    tokenizer().save(folder)
    with warnings.catch_warnings():
        # A shorter context and an unusual pattern of windows are told, and taken into account here.
        warnings.simplefilter("ignore", KoineWarning)
        export_gguf(folder, out, dtype="float32")
    return folder, out


def prompts_of(out: Path) -> list[list[int]]:
    """Return random prompts, each with the new tokens within the file's context."""
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(out).fields
    context = next(field.contents() for name, field in fields.items() if name.endswith(".context_length"))
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(40, tokenizer().vocab_size, (length,), generator=generator).tolist()
        for length in PROMPTS
        if length + NEW_TOKENS <= context
    ]


def llama_cpp(path: Path, work: Path, prompts: list[list[int]], texts: list[str]) -> dict[str, Any]:
    """Return what llama.cpp answers (see `llama_cpp_peer.py`), logits included."""
    request = {
        "model": str(path),
        "context": CONTEXT,
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "texts": texts,
        "logits": str(work / "logits.npz"),
    }
    process = subprocess.run(
        [str(PEER), str(PEER_SCRIPT)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    answer: dict[str, Any] = json.loads(process.stdout)
    logits = np.load(work / "logits.npz")
    answer["logits"] = [torch.from_numpy(logits[str(number)]) for number in range(len(prompts))]
    return answer


def same_in_llama_cpp(folder: Path, out: Path) -> None:
    """llama.cpp gives our greedy tokens and, within `LLAMA_CPP`, our logits."""
    prompts = prompts_of(out)
    assert prompts
    answer = llama_cpp(out, out.parent, prompts, [])
    model = load_model(folder)
    for prompt, theirs in zip(prompts, answer["logits"], strict=True):
        error = _relative(_logits(model, prompt), theirs)
        assert error <= LLAMA_CPP[model.config.activation], f"logits differ by {error:.1e}"
    ours = generate(model, prompts, Sampling(max_new_tokens=NEW_TOKENS, temperature=0), stop_ids=())
    assert answer["answers"] == [one.tokens for one in ours]


def same_in_transformers(folder: Path, out: Path) -> None:
    """`transformers` reads from the file a model with our logits."""
    prompts = prompts_of(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out.parent, gguf_file=out.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = load_model(folder)
    for prompt in prompts:
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt])).logits[0]
        error = _relative(_logits(model, prompt), logits)
        assert error <= 1e-5, f"logits differ by {error:.1e}"


def _logits(model: Any, prompt: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.logits(model(torch.tensor([prompt])))[0]
    return logits


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
