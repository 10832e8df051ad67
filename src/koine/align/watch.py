"""Measure model folders that a training left with a monitor, one after another."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from koine.align.held_out import encode_pairs, encode_prompts
from koine.align.monitor import SAMPLING, Identify, Monitor
from koine.align.overoptimisation import DEFAULT, Constants, Verdict, verdict
from koine.errors import UserError
from koine.generate.sampling import Sampling
from koine.model import load_causal_lm
from koine.model.formats.weight_files import check_adapter
from koine.model.language_model import LanguageModel
from koine.plan.run.progress import report
from koine.tokenizer import load_tokenizer
from koine.train.export import export_checkpoint

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Watched:
    """What a monitor found: `evaluations` as the rule reads them, by step, and the verdict.

    verdict: None where no samples were measured.
    """

    evaluations: tuple[dict[str, float], ...]
    verdict: Verdict | None


def steps_of(paths: Sequence[Path]) -> list[tuple[int, Path]]:
    """Return folders with their steps, in order.

    The step is the last number in a folder's name (`checkpoint-500`). Where a name has none, or two have the
    same, the order given counts, as steps 1, 2, 3 and so on.
    """
    numbers = [re.findall(r"\d+", path.name) for path in paths]
    steps = [int(found[-1]) for found in numbers if found]
    if len(set(steps)) == len(paths):
        return sorted(zip(steps, paths, strict=True))
    return list(enumerate(paths, 1))


def watch_models(
    paths: Sequence[Path],
    *,
    pairs: Sequence[Record] = (),
    prompts: Sequence[Record] = (),
    reference: Path | None = None,
    sampling: Sampling = SAMPLING,
    identify: Identify | None = None,
    constants: Constants = DEFAULT,
    device: str = "cpu",
    dtype: str = "float32",
    out: Path,
) -> Watched:
    """Measure models in the order of their steps (`steps_of`); write the monitor's files to `out`.

    Args:
        paths: model folders of one training, or its checkpoints (`OUT/checkpoints/step-N`).
        pairs: held-out preference records (`koine.align.held_out.read_pairs`).
        prompts: records with prompts (`read_prompts`).
        reference: model folder for the KL; None: no KL.
        sampling: of the answers; it needs a seed.
        identify: names the language of an answer.
        constants: of the over-optimisation rule.
        device: where to compute.
        dtype: precision.
        out: an existing folder.

    Raises:
        UserError: a folder holds no model, or the models have different tokenizers.
    """
    if not paths:
        raise UserError("no model to watch", hint="give the folders of a training's checkpoints")
    tokenizer = load_tokenizer(paths[0])
    for path in (*paths, *([] if reference is None else [reference])):
        if load_tokenizer(path).fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"has another tokenizer than {paths[0]}", where=path, hint="give models of one training"
            )
    monitor: Monitor | None = None
    evaluations = []
    ordered = steps_of(paths)
    for number, (step, path) in enumerate(ordered):
        report(number / len(ordered), f"{path.name} ({number + 1} of {len(ordered)})")
        model = _open(path, device, dtype)
        if monitor is None:
            context = model.context_length
            monitor = Monitor(
                tokenizer,
                pairs=encode_pairs(pairs, tokenizer, context=context) if pairs else (),
                prompts=encode_prompts(prompts, tokenizer, context=context) if prompts else (),
                sampling=sampling,
                reference=None if reference is None else _open(reference, device, dtype),
                identify=identify,
                folder=out,
                constants=constants,
                quiet=True,
            )
        evaluations.append({"step": step, **monitor(model, step)})
    judged = verdict(evaluations, constants) if prompts else None
    return Watched(tuple(evaluations), judged)


def _open(path: Path, device: str, dtype: str) -> LanguageModel:
    """Load a model folder, or a checkpoint of a training of ours, for evaluation."""
    check_adapter(path)
    weights = getattr(torch, dtype)
    if not (path / "checkpoint.json").exists():
        return load_causal_lm(path, dtype=weights, device=device).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(path, Path(folder) / "model")
        return load_causal_lm(Path(folder) / "model", dtype=weights, device=device).eval()
