"""The model card of a merge: what was merged, how, and whose method it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from koine.combine.merging.config import MergeConfig


def model_card(config: MergeConfig, source: str) -> str:
    """Return the card as Markdown, with the configuration as JSON."""
    names = [path.resolve().name for path in config.models]
    weights = config.weights or (None,) * len(names)
    rows = "\n".join(
        f"| {name} | {'' if weight is None else f'{weight:g}'} |"
        for name, weight in zip(names, weights, strict=True)
    )
    base = "" if config.base is None else f"\nTheir common ancestor: {config.base.resolve().name}.\n"
    return f"""---
tags:
- merge
- koine
---

# Merge of {", ".join(names)}

Merged with Koine by the method `{config.method}`: {source}.

| model | weight |
|---|---|
{rows}
{base}
## Configuration

```json
{json.dumps(config.to_json(), indent=2, ensure_ascii=False)}
```
"""
