"""Preference losses and their gradients on a real model: ours beside TRL's trainers, run live.

    python benchmarks/peers/install.py trl
    python benchmarks/preference_losses.py --model DIR --pairs FILE

Both sides get the same pairs and the same weights in float64 (TRL's head computes in float32). The policy is
the model, the reference the model with its last norm scaled by 1.05. Ours computes each prompt once for both
completions; TRL computes it twice. Shown are both losses, and over all weights the largest difference of the
gradients as a share of the largest gradient. Recorded values of a tiny model are in `tests/align/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from koine.align.log_probabilities import completion_log_probabilities
from koine.align.loss_spec import LossSpec
from koine.align.losses import kto_reference_point
from koine.data import Mixture, Phase, PreferenceOrder, Source, tokenize
from koine.data.groups import GroupBatch
from koine.model import Decoder, load_causal_lm, save_model
from koine.model.formats.directory import to_transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers.install import python_of

SIDE = Path(__file__).with_name("preference_losses_side.py")
CASES: list[tuple[str, str, dict[str, Any], int]] = [
    ("dpo:beta=0.1", "DPOTrainer", {"loss_type": ["sigmoid"], "beta": 0.1}, 2),
    ("hinge:beta=0.1", "DPOTrainer", {"loss_type": ["hinge"], "beta": 0.1}, 2),
    ("ipo-mean:beta=0.5", "DPOTrainer", {"loss_type": ["ipo"], "beta": 0.5}, 2),
    (
        "robust:beta=0.1,label_smoothing=0.2",
        "DPOTrainer",
        {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.2},
        2,
    ),
    (
        "dpo:beta=0.1,label_smoothing=0.2",
        "DPOTrainer",
        {"loss_type": ["aot"], "beta": 0.1, "label_smoothing": 0.2},
        1,
    ),
    ("nll-mean", "DPOTrainer", {"loss_type": ["sft"]}, 1),
    (
        "simpo:beta=2,gamma=1",
        "CPOTrainer",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        2,
    ),
    ("kto:beta=0.1", "KTOTrainer", {"beta": 0.1}, 2),
]
"""Our loss, TRL's trainer and settings, and the pairs of the batch."""


def read_pairs(folder: Path, options: argparse.Namespace) -> PreferenceOrder:
    """Tokenize the pairs; a step of the data order is two of them."""
    shards = folder / "shards"
    tokenize(options.pairs, options.model, out=shards, kind="preferences")
    phase = Phase(name="pairs", steps=1, sources=(Source(name="pairs", path=shards, proportion=1.0),))
    mixture = Mixture(phases=(phase,), sequence_length=options.tokens, batch_size=2, packing="one_per_row")
    return PreferenceOrder(mixture)


def completions_of(batch: GroupBatch) -> list[dict[str, list[int]]]:
    """Return the tokens of each completion with its prompt, and which of them count."""
    apart = batch.separate()
    mask = torch.zeros_like(apart.tokens)
    mask.view(-1)[apart.predicted_at] = 1
    lengths = (apart.document_ids >= 0).sum(dim=1).tolist()
    return [
        {"tokens": row[:length].tolist(), "mask": counted[:length].tolist()}
        for row, counted, length in zip(apart.tokens, mask, lengths, strict=True)
    ]


def write_models(folder: Path, model: Path) -> dict[str, Path]:
    """Write the policy, and a reference that differs from it in its last norm."""
    decoder = load_causal_lm(model, dtype=torch.float32)
    assert isinstance(decoder, Decoder)
    folders = {"policy": folder / "policy", "reference": folder / "reference"}
    save_model(decoder, folders["policy"], tokenizer=model)
    with torch.no_grad():
        decoder.norm.weight.mul_(1.05)
    save_model(decoder, folders["reference"])
    return folders


def ours(
    spec: LossSpec, policy: Decoder, reference: Decoder, batch: GroupBatch
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss of a batch and the gradient of every weight under the names of `transformers`."""
    groups = list(batch.groups)
    if spec.groups == "labelled":
        # The chosen completion of a pair is a desirable one.
        groups = [replace(group, kind="labelled", labels=(True, False)) for group in groups]
    with torch.no_grad():
        reference_sums = completion_log_probabilities(reference, batch).sums
    policy.zero_grad()
    sums = completion_log_probabilities(policy, batch)
    z0 = kto_reference_point(sums.sums, reference_sums)
    losses, _ = spec(sums, reference_sums, groups, reference_point=z0)
    losses.mean().backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return float(losses.mean().detach()), to_transformers(gradients, policy.config)


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of two gradients as a share of the largest entry."""
    if set(found) != set(expected):
        raise ValueError(f"gradients of other weights: {sorted(set(found) ^ set(expected))[:3]}")
    largest = max(float(one.abs().max()) for one in expected.values())
    return max(float((found[name] - one).abs().max()) for name, one in expected.items()) / largest


def main() -> None:
    """Run TRL, then ours, and print one line a loss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with a chat template")
    parser.add_argument("--pairs", type=Path, required=True, help="records with prompt, chosen, rejected")
    parser.add_argument("--tokens", type=int, default=192, help="tokens of a pair")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        order, folders = read_pairs(folder, options), write_models(folder, options.model)
        request = {
            **{name: str(path) for name, path in folders.items()},
            "completions": completions_of(order.batch(0)),
            "cases": [
                {"trainer": trainer, "settings": settings, "pairs": pairs}
                for _, trainer, settings, pairs in CASES
            ],
        }
        (folder / "request.json").write_text(json.dumps(request))
        subprocess.run([python_of("trl"), SIDE, folder / "request.json"], check=True, stdout=sys.stderr)
        losses = json.loads((folder / "answer.json").read_text())
        models = [load_causal_lm(path, dtype=torch.float64) for path in folders.values()]
        print("| loss | TRL | Koine | difference | largest difference of gradients, as a share |")
        print("|---|---|---|---|---|")
        for number, (text, _, _, pairs) in enumerate(CASES):
            batch = order.batch(0, micro_batch=slice(0, pairs))
            policy, reference = models
            assert isinstance(policy, Decoder)
            assert isinstance(reference, Decoder)
            loss, gradients = ours(LossSpec.parse(text), policy, reference, batch)
            theirs = losses[str(number)]
            share = largest_difference(gradients, load_file(folder / f"{number}.safetensors"))
            print(f"| `{text}` | {theirs:.7f} | {loss:.7f} | {abs(loss - theirs):.1e} | {share:.1e} |")


if __name__ == "__main__":
    main()
