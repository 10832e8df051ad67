"""A step that puts another attention variant on a model.

Heavy imports are inside the function, so that a run in which everything is up to date never loads torch.
"""

from __future__ import annotations

from pathlib import Path

from koine.files import write_json
from koine.plan import step
from koine.steps import checks, estimates


@step(version="1", estimate=estimates.copy, check=checks.other_attention)
def put_attention(model: Path, *, attention: str, window: int = 0, full_every: int = 0, out: Path) -> None:
    """Put another attention variant on a model; its weights stay.

    Args:
        model: folder of the model.
        attention: name of the variant (`koine.model.layer_patterns`).
        window: tokens that a windowed layer of `rnope-swa` sees; 0: as before.
        full_every: every how many layers of `rnope-swa` one is full; 0: 4.

    Raises:
        UserError: a window or a ratio with a variant that has none, or `rnope-swa` without a window.
    """
    from koine.model import load_model, save_model
    from koine.model.attention_change import change_attention, describe_change
    from koine.model.layer_patterns import variant_name, with_attention

    given = load_model(model)
    config = with_attention(
        given.config,
        attention=attention,  # type: ignore[arg-type]
        window=window or None,
        full_every=full_every or None,
    )
    save_model(change_attention(given, config), out, tokenizer=model)
    write_json(
        out / "metrics.json",
        {"attention": variant_name(config), "change": describe_change(given.config, config)},
    )
