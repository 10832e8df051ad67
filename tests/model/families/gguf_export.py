"""Export a family's checkpoint to GGUF, and let llama.cpp and `transformers` compute it.

The checkpoints are those of the other columns with a tokenizer, a longer context, longer windows, and scores
scaled by the size of a head, as llama.cpp always scales them.
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
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from koine.errors import KoineWarning
from koine.generate import generate
from koine.generate.sampling import Sampling
from koine.model import load_model
from koine.model.formats.gguf import export_gguf
from koine.tokenizer import Tokenizer, train_tokenizer

from .cases import Case
from .checks import FLOAT32, NEW_TOKENS
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
AS_RELEASED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
}
"""Values of released checkpoints, which llama.cpp fixes and a family's first case has otherwise."""
READ_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "num_hidden_layers": 7,
        "layer_types": None,
        "rope_parameters": None,
    },
    "phi3": {},
    "starcoder2": {},
    "qwen3_moe": {"moe_intermediate_size": 768},
}
"""Families whose files the reader of `transformers` takes, with values for what it does not read."""


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
        "vocab_size": ours.vocab_size + 3,
        "pad_token_id": ours.pad_id,
        "bos_token_id": ours.bos_id,
        "eos_token_id": ours.eos_id,
    }
    if "query_pre_attn_scalar" in changes:
        changes["query_pre_attn_scalar"] = changes["head_dim"]
    if changes.get("sliding_window") is not None:
        changes["sliding_window"] = WINDOW
    return replace(case, changes=changes)


def as_released(case: Case) -> Case:
    """Return a case with the values that llama.cpp fixes."""
    changes = AS_RELEASED.get(case.model_type)
    return case if changes is None else replace(case, name="as-released", changes=case.changes | changes)


def for_transformers(case: Case) -> Case:
    """Return a case that the reader of `transformers` reads whole."""
    return replace(case, changes={**as_released(case).changes, **READ_BY_TRANSFORMERS[case.model_type]})


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
    config = transformers.AutoConfig.from_pretrained(out.parent, gguf_file=out.name)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    # `from_pretrained` with `gguf_file` does the same, and needs one more package.
    read = load_gguf_checkpoint(str(out), return_tensors=True, model_to_load=theirs)["tensors"]
    missing = theirs.load_state_dict(read, strict=False).missing_keys
    assert not set(missing) - {"lm_head.weight"}
    model = load_model(folder)
    assert ("lm_head.weight" in missing) <= model.config.tie_embeddings
    if model.config.tie_embeddings:
        theirs.lm_head.weight = theirs.get_input_embeddings().weight
    for prompt in prompts_of(out):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt])).logits[0]
        error = _relative(_logits(model, prompt), logits)
        assert error <= FLOAT32, f"logits differ by {error:.1e}"


def runs_elsewhere(case: Case, work: Path) -> None:
    """The exported file is computed by llama.cpp as by us, or where it is not installed by `transformers`.

    Where neither reads it, the export alone is checked.
    """
    if PEER.exists():
        same_in_llama_cpp(*exported(as_released(case), work))
    elif case.model_type in READ_BY_TRANSFORMERS:
        same_in_transformers(*exported(for_transformers(case), work))
    else:
        exported(as_released(case), work)


def _logits(model: Any, prompt: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.logits(model(torch.tensor([prompt])))[0]
    return logits


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
