"""The model card of a merge: what was merged, how, and whose method it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from koine.combine.merging.config import Recipe


def model_card(recipe: Recipe, source: str) -> str:
    """Markdown, with the recipe as JSON that `koine.combine.merging.config.Recipe` reads back."""
    names = [path.resolve().name for path in recipe.models]
    weights = recipe.weights or (None,) * len(names)
    rows = "\n".join(
        f"| {name} | {'' if weight is None else f'{weight:g}'} |"
        for name, weight in zip(names, weights, strict=True)
    )
    base = "" if recipe.base is None else f"\nTheir common ancestor: {recipe.base.resolve().name}.\n"
    return f"""---
tags:
- merge
- koine
---

# Merge of {", ".join(names)}

Merged with Koine by the method `{recipe.method}`: {source}.

| model | weight |
|---|---|
{rows}
{base}
## Recipe

```json
{json.dumps(recipe.to_json(), indent=2, ensure_ascii=False)}
```
"""
