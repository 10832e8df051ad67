"""Match the names of tensors between checkpoints of one architecture.

What differs in files and does not change what they compute is matched or left out: buffers that old versions
of `transformers` saved, the prefix of the part below the head, old names of a LayerNorm's weights, and the
copy of the embedding that a tied head is. The first model's names count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from koine.combine.compatibility import model_configuration, ties_embeddings
from koine.combine.merging.methods import BLOCK
from koine.combine.merging.vocabulary_tensors import vocabulary_sizes
from koine.errors import UserError
from koine.model.formats.library_config import skeleton
from koine.model.formats.safetensors_stream import Checkpoint, Entry

ROTARY = re.compile(
    r"(^|\.)(rotary|rotary_emb|rotary_pos_emb|rotary_embedding)\.(inv_freq|cos_cached|sin_cached)$"
)
MASK = re.compile(r"(^|\.)(attn|attention|self_attention|crossattention|self_attn)\.(bias|causal_mask)$")
MASKED_BIAS = re.compile(r"(^|\.)masked_bias$")
IDS = re.compile(r"(^|\.)(position_ids|token_type_ids)$")
HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|decoder|head|output|output_projection|proj_out|vocab_projector)"
    r"\.(weight|bias)$"
)


def is_saved_buffer(name: str, entry: Entry) -> bool:
    """Return whether a tensor follows from the configuration, by its name and shape.

    Old checkpoints hold such buffers: causal masks, rotary tables, position ids.
    """
    shape = entry.shape
    if ROTARY.search(name):
        return len(shape) <= 4
    if MASK.search(name):
        # A causal mask is square and for all heads; the bias of a projection has one dimension.
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    if MASKED_BIAS.search(name):
        return entry.numel == 1
    if IDS.search(name):
        return not entry.dtype.is_floating_point and len(shape) in (1, 2)
    return False


def match_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the tensors that all models have, in the first model's order.

    The other models' entries are renamed to the first model's names.

    Raises:
        UserError: A model lacks tensors or has more.
    """
    first = checkpoints[0]
    for one in checkpoints:
        _keep(one, [name for name, entry in one.items() if not is_saved_buffer(name, entry)])
    for one in checkpoints[1:]:
        _rename(one, first)
    _drop_tied_copies(checkpoints)
    if len({frozenset(one) for one in checkpoints}) > 1:
        _drop_ignored_tensors(checkpoints)
    for one in checkpoints[1:]:
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


def _current_name(name: str) -> str:
    """Return a name as current versions of `transformers` write it."""
    return re.sub(
        r"LayerNorm\.(gamma|beta)$",
        lambda found: f"LayerNorm.{'weight' if found[1] == 'gamma' else 'bias'}",
        name,
    )


def _rename(one: Checkpoint, first: Checkpoint) -> None:
    """Rename the entries of `one` to the names that `first` has for them."""
    current = {_current_name(name): name for name in first}
    one.entries = {_known(name, first, current): entry for name, entry in one.items()}
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
            ours = prefix + _current_name(name) if added else _current_name(name).removeprefix(prefix)
            names[name] = (
                current.get(ours, ours) if name in extra and current.get(ours, ours) in first else name
            )
        one.entries = {names[name]: entry for name, entry in one.items()}
        return


def _known(name: str, first: Checkpoint, current: dict[str, str]) -> str:
    return name if name in first else current.get(_current_name(name), name)


def _prefix(longer: Sequence[str], shorter: Sequence[str]) -> str | None:
    """Return the prefix that turns most of the shorter names into longer ones."""
    known = {_current_name(name) for name in shorter}
    counts: Counter[str] = Counter()
    for name in longer:
        parts = _current_name(name).split(".")
        for count in range(1, min(4, len(parts))):
            if ".".join(parts[count:]) in known:
                counts[".".join(parts[:count]) + "."] += 1
                break
    return counts.most_common(1)[0][0] if counts else None


def _drop_tied_copies(checkpoints: Sequence[Checkpoint]) -> None:
    """Drop the copies of their embedding that models with a tied head hold.

    A tensor that differs from the embedding stays: `transformers` then does not tie. A copy that all models
    have stays where the configuration says that nothing is tied, or where there is none.
    """
    common = set.intersection(*(set(one) for one in checkpoints))
    names = dict.fromkeys(name for one in checkpoints for name in one)
    candidates = [name for name in names if name not in common or HEAD.search(name)]
    # Only these need the library's default.
    tied = [ties_embeddings(one.path) for one in checkpoints] if candidates else []
    for name in candidates:
        having = [one for one in checkpoints if name in one]
        if False in tied or (len(having) == len(checkpoints) and not all(tied)):
            continue
        if all(_is_copy(one, name, common) for one in having):
            for one in having:
                del one.entries[name]
            common.discard(name)


def drop_tied_head(one: Checkpoint) -> None:
    """Drop the copy of its embedding that a model with a tied head may hold.

    A merge of the embedding alone would untie it.
    """
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
    # The original is an embedding, not another head.
    others = [
        other
        for other in one
        if other != name
        and other in common
        and (one[other].shape, one[other].dtype) == (entry.shape, entry.dtype)
    ]
    return any(
        _equal(one, name, other)
        for other in others
        if not ((head := HEAD.search(other)) and head[2] == "weight")
    )


def _equal(one: Checkpoint, name: str, other: str) -> bool:
    """Return whether two tensors of a checkpoint have the same bytes."""
    entry = one[name]
    rows = max(1, BLOCK // max(1, entry.row))
    return all(
        torch.equal(
            one.read(name, start, min(entry.rows, start + rows)).view(torch.uint8),
            one.read(other, start, min(entry.rows, start + rows)).view(torch.uint8),
        )
        for start in range(0, entry.rows, rows)
    )


def _drop_ignored_tensors(checkpoints: Sequence[Checkpoint]) -> None:
    """Drop tensors that not all models have and that the architecture's class is known to ignore in files."""
    first = checkpoints[0]
    content = model_configuration(first.path)
    known = skeleton(content, where=first.path / "config.json") if content else None
    if known is None or not known.ignored:
        return
    common = set.intersection(*(set(one) for one in checkpoints))
    for one in checkpoints:
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
