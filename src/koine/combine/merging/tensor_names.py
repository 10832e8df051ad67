"""The tensors that models have in common, whatever each file calls them.

Files of one architecture differ in what does not change what it computes: buffers that old versions of
`transformers` saved, the prefix of the part below the head, the names of a LayerNorm's weights, and the copy
of an embedding that a tied head is. The first model's names count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from koine.combine.compatibility import model_configuration, ties_embeddings
from koine.combine.merging.methods import BLOCK
from koine.combine.merging.vocabulary_tensors import vocabulary_sizes
from koine.combine.safetensors_stream import Checkpoint, Entry
from koine.errors import UserError
from koine.model.formats.library_config import skeleton

ROTARY = re.compile(
    r"(^|\.)(rotary|rotary_emb|rotary_pos_emb|rotary_embedding)\.(inv_freq|cos_cached|sin_cached)$"
)
MASK = re.compile(r"(^|\.)(attn|attention|self_attention|crossattention|self_attn)\.(bias|causal_mask)$")
MASKED = re.compile(r"(^|\.)masked_bias$")
NUMBERED = re.compile(r"(^|\.)(position_ids|token_type_ids)$")
HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|decoder|head|output|output_projection|proj_out|vocab_projector)\.(weight|bias)$"
)


def is_saved_buffer(name: str, entry: Entry) -> bool:
    """Return whether a tensor is one that follows from the configuration, as old checkpoints hold them: by
    its name and its shape."""
    shape = entry.shape
    if ROTARY.search(name):
        return len(shape) <= 4
    if MASK.search(name):
        # A causal mask is square and stands for all heads; the bias of a projection has one dimension.
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    if MASKED.search(name):
        return entry.numel == 1
    if NUMBERED.search(name):
        return not entry.dtype.is_floating_point and len(shape) in (1, 2)
    return False


def match_names(inputs: Sequence[Checkpoint]) -> list[str]:
    """The tensors that all models have, in the first's order and by its names, under which the others'
    entries then stand too.

    Raises `UserError` where a model lacks tensors or has more.
    """
    first = inputs[0]
    for one in inputs:
        _keep(one, [name for name, entry in one.items() if not is_saved_buffer(name, entry)])
    for one in inputs[1:]:
        _rename(one, first)
    _leave_tied_copies(inputs)
    if len({frozenset(one) for one in inputs}) > 1:
        _leave_what_the_library_ignores(inputs)
    for one in inputs[1:]:
        missing = [name for name in first if name not in one]
        extra = [name for name in one if name not in first]
        if missing or extra:
            raise UserError(
                f"lacks {missing[0]}" if missing else f"has {extra[0]}, which {first.path} lacks",
                where=one.path,
                hint="models of one architecture and size can be merged",
            )
    return list(first)


def _keep(one: Checkpoint, names: Iterable[str]) -> None:
    one.entries = {name: one.entries[name] for name in names}


def _plain(name: str) -> str:
    """A name as newer versions write it."""
    return re.sub(
        r"LayerNorm\.(gamma|beta)$",
        lambda found: f"LayerNorm.{'weight' if found[1] == 'gamma' else 'bias'}",
        name,
    )


def _rename(one: Checkpoint, first: Checkpoint) -> None:
    """Put the entries of `one` under the names that `first` has for them."""
    plain = {_plain(name): name for name in first}
    one.entries = {_known(name, first, plain): entry for name, entry in one.items()}
    missing = [name for name in first if name not in one]
    extra = [name for name in one if name not in first]
    if not missing or not extra:
        return
    for longer, shorter, added in ((missing, extra, True), (extra, missing, False)):
        prefix = _prefix(longer, shorter)
        if prefix is None:
            continue
        names = {}
        for name in one:
            ours = prefix + _plain(name) if added else _plain(name).removeprefix(prefix)
            names[name] = plain.get(ours, ours) if name in extra and plain.get(ours, ours) in first else name
        one.entries = {names[name]: entry for name, entry in one.items()}
        return


def _known(name: str, first: Checkpoint, plain: dict[str, str]) -> str:
    return name if name in first else plain.get(_plain(name), name)


def _prefix(longer: Sequence[str], shorter: Sequence[str]) -> str | None:
    """The prefix that turns most of the shorter names into longer ones."""
    known = {_plain(name) for name in shorter}
    counts: Counter[str] = Counter()
    for name in longer:
        parts = _plain(name).split(".")
        for count in range(1, min(4, len(parts))):
            if ".".join(parts[count:]) in known:
                counts[".".join(parts[:count]) + "."] += 1
                break
    return counts.most_common(1)[0][0] if counts else None


def _leave_tied_copies(inputs: Sequence[Checkpoint]) -> None:
    """Leave out the copies that models with a tied head keep of their embedding, where they are copies.

    One that differs from the embedding is none: `transformers` then does not tie. Where the configuration
    says that nothing is tied, a copy that all models have stays; without a configuration, it stays as well.
    """
    common = set.intersection(*(set(one) for one in inputs))
    names = dict.fromkeys(name for one in inputs for name in one)
    candidates = [name for name in names if name not in common or HEAD.search(name)]
    # The library's default is asked for where it decides alone.
    tied = [ties_embeddings(one.path) for one in inputs] if candidates else []
    for name in candidates:
        having = [one for one in inputs if name in one]
        if False in tied or (len(having) == len(inputs) and not all(tied)):
            continue
        if all(_is_copy(one, name, common) for one in having):
            for one in having:
                del one.entries[name]
            common.discard(name)


def leave_tied_head(one: Checkpoint) -> None:
    """Leave out the copy of its embedding that a model with a tied head may keep: a merge of the embedding
    alone would untie it."""
    if ties_embeddings(one.path) is not False:
        for name in [name for name in one if HEAD.search(name)]:
            if _is_copy(one, name, set(one)):
                del one.entries[name]


def _is_copy(one: Checkpoint, name: str, common: set[str]) -> bool:
    """Return whether a tensor of a vocabulary's length has the same bytes as another that all models have."""
    entry = one[name]
    sizes = vocabulary_sizes(model_configuration(one.path))
    if not entry.shape or (sizes and entry.rows not in sizes):
        return False
    # An embedding first; a head is no original of another head.
    others = [
        other
        for other in one
        if other != name and other in common and one[other].shape == entry.shape and one[other].dtype == entry.dtype
    ]  # fmt: skip
    return any(
        _equal(one, name, other)
        for other in others
        if not ((head := HEAD.search(other)) and head[2] == "weight")
    )


def _equal(one: Checkpoint, name: str, other: str) -> bool:
    entry = one[name]
    rows = max(1, BLOCK // max(1, entry.row))
    return all(
        torch.equal(
            one.read(name, start, min(entry.rows, start + rows)).view(torch.uint8),
            one.read(other, start, min(entry.rows, start + rows)).view(torch.uint8),
        )
        for start in range(0, entry.rows, rows)
    )


def _leave_what_the_library_ignores(inputs: Sequence[Checkpoint]) -> None:
    """Leave out tensors that not all models have, and that the architecture's class is known to find in files
    and not to read."""
    first = inputs[0]
    content = model_configuration(first.path)
    known = skeleton(content, where=first.path / "config.json") if content else None
    if known is None or not known.ignored:
        return
    common = set.intersection(*(set(one) for one in inputs))
    for one in inputs:
        _keep(
            one,
            [
                name
                for name in one
                if name in common
                or name in known.shapes
                or not any(re.search(pattern, name) for pattern in known.ignored)
            ],
        )
