"""The model card of a merge: what was merged, how, and whose method it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from koine.model.formats.model_card import ModelCard, Parent

if TYPE_CHECKING:
    from koine.combine.merging.config import MergeConfig


def merge_card(config: MergeConfig, source: str) -> ModelCard:
    """Return the card of a merge by a method of this source."""
    names = [path.resolve().name for path in config.models]
    weights = config.weights or (None,) * len(names)
    parents = [
        Parent(path=path, role="merged" if weight is None else f"merged, weight {weight:g}")
        for path, weight in zip(config.models, weights, strict=True)
    ]
    if config.base is not None:
        parents.append(Parent(path=config.base, role="common ancestor"))
    content = config.to_json()
    del content["models"], content["base"]
    return ModelCard(
        title=f"Merge of {', '.join(names)}",
        summary=f"Weights merged by the method `{config.method}`: {source}.",
        parents=tuple(parents),
        relation="merge",
        parameters=content,
        tags=("merge", config.method),
    )
