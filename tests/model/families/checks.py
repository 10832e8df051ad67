"""What must hold for every family; each function raises `AssertionError` where it does not.

Tests call them for every case, the table (`tests.model.families.table`) for one case of a family.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from koine.generate import Scheduler
from koine.generate.cache.contexts import DecodeContext, PrefillContext
from koine.generate.cache.paged_cache import PagedCache
from koine.generate.cpu.prepacked_linear import can_prepack, prepack
from koine.generate.sampling import Sampling
from koine.model import Decoder, load_model, save_model
from tests.model.drift import hidden_states

from .cases import TEXT_LENGTH, Case
from .reference import (
    open_reference,
    reference_blocks,
    reference_cached_logits,
    reference_greedy,
    reference_logits,
    relative_error,
    text,
)

FLOAT32 = 1e-5
"""Largest error of a block's output and of the logits in float32, relative to the largest value."""
GRADIENT = 1e-4
"""Largest error of a gradient, relative to the largest value of its tensor."""
BFLOAT16 = 1.5
"""In bfloat16 our error may be this many times that of `transformers`, both against float32."""
NEW_TOKENS = 32

BOOKKEEPING = frozenset({"_name_or_path", "transformers_version"})
"""Fields of a configuration that say nothing about the model."""


def agree(got: Tensor, expected: Tensor, what: str) -> None:
    """Assert that two tensors agree within `FLOAT32`."""
    error = relative_error(got, expected)
    assert error <= FLOAT32, f"{what} differ by {error:.1e}"


def opens(folder: Path) -> None:
    """Our decoder opens the checkpoint and has as many weights as the reference."""
    ours, theirs = load_model(folder), open_reference(folder)
    assert isinstance(ours, Decoder)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def blocks_and_logits(folder: Path) -> None:
    """Each block's output and the logits of a text agree; the first block that differs is named."""
    ours, theirs, ids = load_model(folder), open_reference(folder), text(TEXT_LENGTH)
    with torch.no_grad():
        blocks = hidden_states(ours, torch.tensor([ids]))
        logits = ours.logits(ours(torch.tensor([ids])))[0]
    expected = reference_blocks(theirs, ids)
    assert len(blocks) == len(expected)
    for number, (a, b) in enumerate(zip(blocks, expected, strict=True)):
        agree(a, b, f"outputs of block {number - 1}" if number else "inputs of the first block")
    agree(logits, reference_logits(theirs, ids), "logits")


def forward(folder: Path, case: Case) -> None:
    """All that one forward pass or several with a cache compute."""
    blocks_and_logits(folder)
    cached(folder, case)
    left_padded(folder)
    packed_documents(folder)


def left_padded(folder: Path) -> None:
    """Texts of a left-padded batch have the logits that each has alone."""
    ours, theirs = load_model(folder), open_reference(folder)
    rows = [text(length, seed) for seed, length in enumerate((TEXT_LENGTH, 12, 30))]
    ids = torch.zeros(3, TEXT_LENGTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, -len(tokens) :], mask[row, -len(tokens) :] = torch.tensor(tokens), 1
    with torch.no_grad():
        logits = ours.logits(ours(ids, attention_mask=mask))
    for row, tokens in enumerate(rows):
        agree(logits[row, -len(tokens) :], reference_logits(theirs, tokens), f"logits of row {row}")


def packed_documents(folder: Path) -> None:
    """Documents packed into one row have the logits that each has alone."""
    ours, theirs = load_model(folder), open_reference(folder)
    lengths = (19, 4, 22)
    documents = [text(length, seed) for seed, length in enumerate(lengths)]
    ids = torch.tensor([[token for document in documents for token in document]])
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    restarted = torch.cat([torch.arange(length) for length in lengths])[None]
    for positions in (None, restarted):
        with torch.no_grad():
            logits = ours.logits(ours(ids, document_ids=numbers, positions=positions))[0]
        for number, (part, document) in enumerate(zip(logits.split(lengths), documents, strict=True)):
            agree(part, reference_logits(theirs, document), f"logits of document {number}")


def cached(folder: Path, case: Case) -> None:
    """Prefill in chunks, then decode two sequences together past the window: the logits agree."""
    ours, theirs = load_model(folder), open_reference(folder)
    first, second = text(TEXT_LENGTH, 1), text(TEXT_LENGTH + 4, 2)
    # A pass is one chunk of a sequence, or chunks of both in one row. In the last one the positions of the
    # second go on where those of the first end.
    passes = [(7, 0), (0, 3), (14, 7), (0, 12), (1, 4)]
    cache = PagedCache.of_model(ours, page=4)
    sequences = [cache.add(), cache.add()]
    chunks: tuple[list[list[int]], list[list[int]]] = ([], [])
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.inference_mode():
        for counts in passes:
            row = [index for index in (0, 1) if counts[index]]
            new = []
            for index in row:
                start = sequences[index].length
                new.append((first, second)[index][start : start + counts[index]])
                chunks[index].append(new[-1])
            context = PrefillContext(cache, [sequences[i] for i in row], [counts[i] for i in row])
            tokens = [token for chunk in new for token in chunk]
            logits = ours.logits(ours(torch.tensor([tokens]), context=context))[0]
            for index, part in zip(row, logits.split([counts[i] for i in row]), strict=True):
                parts[index].append(part)
        while sequences[0].length < len(first):
            tokens = [ids[sequence.length] for ids, sequence in zip((first, second), sequences, strict=True)]
            logits = ours.logits(ours(torch.tensor(tokens)[:, None], context=DecodeContext(cache, sequences)))
            for index in (0, 1):
                chunks[index].append([tokens[index]])
                parts[index].append(logits[index])
    for index, ids in enumerate((first, second)):
        got = torch.cat(parts[index])
        # Keys in a cache keep the frequencies of their time where RoPE is dynamic.
        expected = (
            reference_cached_logits(theirs, chunks[index]) if case.dynamic else reference_logits(theirs, ids)
        )
        agree(got, expected, f"cached logits of sequence {index}")


def gradients(folder: Path) -> None:
    """The gradients of all parameters agree, under the names of the file."""
    ours, theirs = load_model(folder).train(), open_reference(folder).train()
    ids = torch.tensor([text(TEXT_LENGTH, 3), text(TEXT_LENGTH, 4)])

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss(ours.logits(ours(ids))).backward()
    loss(theirs(ids).logits).backward()
    got = _stored_gradients(ours)
    expected = _reference_gradients(theirs)
    assert got.keys() == expected.keys()
    most = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((got[name] - gradient).abs().max())
        # The bias of a key has a gradient of zero without RoPE: softmax ignores it.
        assert error <= GRADIENT * float(gradient.abs().max()) + 1e-6 * most, f"gradients of {name}: {error}"


def _reference_gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of a class under the names of its files: it stores fused experts apart."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _all_tensors(Path(folder))


def _stored_gradients(model: Decoder) -> dict[str, Tensor]:
    """Return the gradients as a checkpoint would store them: names of the file, fused matrices split."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for target, source in zip(copied.parameters(), model.parameters(), strict=True):
            assert source.grad is not None
            target.copy_(source.grad)
    return {name: gradient.detach() for name, gradient in copied.stored_tensors().items()}


def saved_as_own_class(folder: Path, target: Path) -> None:
    """What we save is what was read: tensors, dtype, configuration, class, logits."""
    save_model(load_model(folder), target)
    read, written = _all_tensors(folder), _all_tensors(target)
    assert written.keys() == read.keys()
    for name, tensor in read.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    assert _differences(_described(folder), _described(target)) == {}
    first, second = open_reference(folder), open_reference(target)
    assert type(second) is type(first)
    ids = text(TEXT_LENGTH)
    # Not the same bits: a mapped matrix of one row (a gate) may lie at another alignment, and is then summed
    # in another order.
    assert relative_error(reference_logits(second, ids), reference_logits(first, ids)) < 2e-6


def _all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def _described(folder: Path) -> dict[str, Any]:
    described = transformers.AutoConfig.from_pretrained(folder).to_dict()
    if described.get("head_dim") is None:
        # Classes without the field derive it; written out, it says the same.
        described["head_dim"] = described["hidden_size"] // described["num_attention_heads"]
    return {name: value for name, value in described.items() if name not in BOOKKEEPING}


def _differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, each with both values; an absent one is None."""
    names = sorted(expected.keys() | got.keys())
    return {
        name: (expected.get(name), got.get(name)) for name in names if expected.get(name) != got.get(name)
    }


def bfloat16_logits(folder: Path) -> None:
    """In bfloat16 the logits are about as close to float32 as those of `transformers`."""
    ours, theirs, ids = load_model(folder), open_reference(folder), text(TEXT_LENGTH)
    assert ours.embedding.weight.dtype == theirs.dtype == torch.bfloat16
    with torch.no_grad():
        got = ours.logits(ours(torch.tensor([ids])))[0]
    usual = reference_logits(theirs, ids)
    exact = reference_logits(theirs.float(), ids)
    if ours.config.mixture is None:
        error, usual_error = (float((one.float() - exact).norm() / exact.norm()) for one in (got, usual))
    else:
        # Where two experts have almost equal probabilities, rounding sends the token to the other one.
        error, usual_error = (
            float(((one.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).median()) for one in (got, usual)
        )
    assert error <= BFLOAT16 * usual_error, f"error {error:.1e}, of transformers {usual_error:.1e}"


def older_spelling(folder: Path, target: Path) -> None:
    """A config.json from before `rope_parameters` gives the same model, and is saved as the same one."""
    value = json.loads((folder / "config.json").read_text())
    older = older_config(value)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "config.json").write_text(json.dumps(older))
    expected = _without_old_names(_described(folder))
    read = _without_old_names(_described(target))
    assert _differences(expected, read) == {}, "transformers reads another model"
    ids = torch.tensor([text(TEXT_LENGTH)])
    models = [load_model(path) for path in (folder, target)]
    with torch.no_grad():
        new, old = (model.logits(model(ids)) for model in models)
    assert torch.equal(old, new)
    save_model(models[1], target / "saved")
    assert _differences(expected, _without_old_names(_described(target / "saved"))) == {}


def older_config(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json as it was written before version 5 of `transformers`."""
    older = {name: entry for name, entry in value.items() if name not in ("rope_parameters", "dtype")}
    older["torch_dtype"] = value["dtype"]
    rope = dict(value["rope_parameters"])
    if "full_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    older["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    # The oldest name of the field is "type"; Llama 3 and Gemma 3 came with "rope_type".
    key = "rope_type" if value["model_type"] == "gemma3_text" or kind == "llama3" else "type"
    older["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    return older


def _without_old_names(described: dict[str, Any]) -> dict[str, Any]:
    """Drop what `transformers` keeps of an older spelling beside the new one."""
    rope = {name: value for name, value in described["rope_parameters"].items() if name != "type"}
    rest = {name: value for name, value in described.items() if name != "partial_rotary_factor"}
    return {**rest, "rope_parameters": rope}


def batched_engine(folder: Path, case: Case) -> None:
    """Three prompts in one batch have the greedy tokens of `generate`, also with prepacked weights."""
    theirs = open_reference(folder)
    prompts = [text(length, 10 + length) for length in (17, 3, 24)]
    expected = [reference_greedy(theirs, prompt, NEW_TOKENS) for prompt in prompts]
    # `generate` prefills a prompt as a whole, which dynamic RoPE sees.
    chunk = 64 if case.dynamic else 11
    assert batched_tokens(load_model(folder), prompts, chunk) == expected
    packed = load_model(folder)
    if can_prepack(packed):
        prepack(packed)
        assert batched_tokens(packed, prompts, chunk) == expected, "prepacked weights give other tokens"


def batched_tokens(model: Decoder, prompts: Sequence[Sequence[int]], chunk: int) -> list[list[int]]:
    """Return greedy tokens of a batch by the scheduler; prompts are prefilled in rows of `chunk` tokens."""
    scheduler = Scheduler(model, max_batch=len(prompts), prefill_chunk=chunk, page=4)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
    requests = [scheduler.submit(prompt, sampling) for prompt in prompts]
    scheduler.run()
    return [request.tokens for request in requests]
