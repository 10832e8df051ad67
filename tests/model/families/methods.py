"""Methods on every family's checkpoint: vocabulary extension, training, attention weights, counts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from koine.evaluate.long_context.attention import block_attention
from koine.model import Decoder, load_model
from koine.model.adapt import move_model, vocabulary_transfer
from koine.model.block import Block
from koine.model.causal_lm import load_with_transformers
from koine.model.counting import count_parameters, forward_flops, visible_pairs
from koine.tokenizer import Tokenizer
from koine.tokenizer.extend import extend_tokenizer
from koine.train.decay import block_matrices, decayed_parameters
from tests.model.adapt.conftest import GERMAN, KOREAN, trained
from tests.model.drift import hidden_states

from .cases import TEXT_LENGTH, Case
from .reference import open_reference, relative_error, text, write_checkpoint

PADDING = 5
"""Rows of the embedding beyond the tokenizer's ids, as published models often have."""
NEW_TOKENS = 12


def vocabulary_extension(case: Case, work: Path) -> None:
    """Moved to a longer tokenizer, the folder is what the class of `transformers` gives, tensor by tensor.

    The model is that of the case with the vocabulary of a German tokenizer; Korean tokens are added.
    """
    tokenizer = trained(GERMAN, 330)
    given = work / "given"
    sized = replace(case, changes={**case.changes, "vocab_size": tokenizer.vocab_size + PADDING})
    write_checkpoint(sized, given)
    tokenizer.save(given)
    longer = extend_tokenizer(given, ((line, 1) for line in KOREAN), new_tokens=NEW_TOKENS).tokenizer
    longer.save(work / "longer")
    moved = move_model(given, work / "longer", work / "moved")
    assert (moved.padding, moved.rows, moved.reversible) == (PADDING, longer.vocab_size, True)
    with patch.object(vocabulary_transfer, "load_as_stored", load_with_transformers):
        move_model(given, work / "longer", work / "expected")
    got, expected = (load_file(work / name / "model.safetensors") for name in ("moved", "expected"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    before, after = (
        transformers.AutoConfig.from_pretrained(work / name).to_dict() for name in ("given", "moved")
    )
    expected_fields = before | {
        "vocab_size": longer.vocab_size + PADDING,
        "bos_token_id": longer.bos_id,
        "eos_token_id": longer.eos_id,
        "pad_token_id": longer.pad_id,
    }
    unequal = {name for name in before if after.get(name) != expected_fields[name]}
    assert unequal <= {"_name_or_path", "transformers_version"}, unequal
    shared_scores(given, work / "moved", tokenizer, longer)
    move_model(work / "moved", given, work / "back")
    shutil.rmtree(work / "expected")
    first, back = (load_file(work / name / "model.safetensors") for name in ("given", "back"))
    assert all(torch.equal(back[name], tensor) for name, tensor in first.items())


def shared_scores(given: Path, moved: Path, tokenizer: Tokenizer, longer: Tokenizer) -> None:
    """A text of old tokens has the logits of old tokens that it had, by the class of `transformers`."""
    match = vocabulary_transfer.match_tokenizers(given, moved)
    # Not special ones, as a text has them.
    old = tokenizer.encode(GERMAN[0])
    place = {source: target for target, source in match.shared.items()}
    new = [place[one] for one in old]
    with torch.no_grad():
        before = open_reference(given)(torch.tensor([old])).logits[0]
        after = open_reference(moved)(torch.tensor([new])).logits[0]
    columns = sorted(match.shared)
    error = relative_error(after[:, columns], before[:, [match.shared[one] for one in columns]])
    assert error <= 1e-5, f"logits of shared tokens differ by {error:.1e}"


def trains_on_packed_documents(folder: Path) -> None:
    """Gradients of packed documents are the sum of those alone, with gradient checkpointing and without."""
    lengths = (19, 4, 22)
    documents = [text(length, seed) for seed, length in enumerate(lengths)]
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    alone = load_model(folder).train()
    for document in documents:
        _loss(alone, torch.tensor([document]), None).backward()  # type: ignore[no-untyped-call]
    expected = {name: weight.grad for name, weight in alone.named_parameters()}
    for recompute in (False, True):
        packed = load_model(folder).train()
        packed.set_gradient_checkpointing(recompute)
        row = torch.tensor([[token for document in documents for token in document]])
        _loss(packed, row, numbers).backward()  # type: ignore[no-untyped-call]
        most = max(float(one.abs().max()) for one in expected.values() if one is not None)
        for name, weight in packed.named_parameters():
            gradient = expected[name]
            assert weight.grad is not None
            assert gradient is not None
            error = float((weight.grad - gradient).abs().max())
            assert error <= 1e-4 * float(gradient.abs().max()) + 1e-6 * most, f"{name}: {error}"


def _loss(model: Decoder, ids: Tensor, documents: Tensor | None) -> Tensor:
    """Return the sum of the losses of all tokens but the first of each document."""
    logits = model.logits(model(ids, document_ids=documents))[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    if documents is not None:
        losses = losses[documents[0, 1:] == documents[0, :-1]]
    return losses.sum()


def attention_weights(folder: Path) -> None:
    """The attention weights of each layer are those that the class returns, for some rows and for all."""
    ours, theirs, ids = load_model(folder), open_reference(folder), torch.tensor([text(TEXT_LENGTH)])
    with torch.inference_mode():
        inputs = hidden_states(ours, ids)
        expected = theirs(ids, output_attentions=True, use_cache=False).attentions
        assert len(expected) == len(ours.blocks)
        for index, block in enumerate(ours.blocks):
            assert isinstance(block, Block)
            for rows in (slice(0, TEXT_LENGTH), slice(30, 37)):
                got = block_attention(block, inputs[index], rows)
                error = relative_error(got, expected[index][0, :, rows])
                assert error <= 2e-5, f"attention of layer {index} differs by {error:.1e}"


def counts(folder: Path) -> None:
    """Parameters and operations are those that torch counts in the class of `transformers`."""
    config = load_model(folder).config
    theirs = open_reference(folder)
    if config.mixture is not None:
        # One product for each expert with its tokens: torch does not count those of fused kernels.
        theirs.set_experts_implementation("eager")
    assert count_parameters(config).total == sum(weight.numel() for weight in theirs.parameters())
    ids = torch.tensor([text(TEXT_LENGTH)])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(ids, use_cache=False)
    # The class computes masked pairs too.
    pairs = sum(TEXT_LENGTH**2 - visible_pairs(TEXT_LENGTH, layer.window) for layer in config.layers)
    assert counter.get_total_flops() == forward_flops(config, TEXT_LENGTH) + 4 * config.attention_size * pairs


def optimised_parameters(folder: Path) -> None:
    """Weight decay acts on linear maps and embeddings, Muon on the linear maps of the blocks.

    For dense models: the experts of a class are stacked tensors in no linear map.
    """
    theirs = open_reference(folder)
    embeddings = {id(theirs.get_input_embeddings().weight), id(theirs.get_output_embeddings().weight)}
    linear = {
        f"{name}.weight"
        for name, module in theirs.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings
    }
    ends = {name for name, weight in theirs.named_parameters() if id(weight) in embeddings}
    ours = load_model(folder)
    assert _stored_names(ours, decayed_parameters(ours)) == linear | ends
    assert _stored_names(ours, block_matrices(ours)) == linear


def _stored_names(model: Decoder, names: Any) -> set[str]:
    """Return which tensors of the file hold the parameters of these names."""
    marked = _filled(model, {name: float(name in names) for name, _ in model.named_parameters()})
    values = {name: torch.unique(tensor).tolist() for name, tensor in marked.stored_tensors().items()}
    assert all(value in ([0.0], [1.0]) for value in values.values()), values
    return {name for name, value in values.items() if value == [1.0]}


def _filled(model: Decoder, values: dict[str, float]) -> Decoder:
    """Return a decoder of the same configuration whose parameters are these constants."""
    filled = Decoder(model.config)
    with torch.no_grad():
        for name, weight in filled.named_parameters():
            weight.fill_(values[name])
    return filled
