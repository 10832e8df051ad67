"""Checks of the table: upcycling branches of a family, and a LoRA adapter beside `peft`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from koine.combine.moe.branches import open_branch
from koine.model import LoraConfig, load_causal_lm
from koine.model.config import MixtureConfig
from tests.combine.moe.families import write_family
from tests.combine.moe.test_families import METHODS, logits, relative, upcycle


def upcycling(folder: Path, family: str, work: Path) -> None:
    """Assert that mixtures of identical branches are the dense model, for each method but Nexus.

    Nexus adds the shared expert to the routed ones: there the mixture is only opened and computed. Raises
    `UserError` for a model that cannot be upcycled.
    """
    branch = open_branch(folder, "seed")
    # Refuses what cannot be an expert.
    replace(branch.config, mixture=MixtureConfig(experts=("code",)))
    for method in METHODS:
        with tempfile.TemporaryDirectory(dir=work) as place:
            seed, paths = write_family(Path(place), family, ("code", "law"), spread=0.0, dtype=torch.float64)
            out = Path(place) / "out"
            upcycle(method, seed, paths, out, top_k=2, normalise_top_k=True)
            got = logits(out)
            assert torch.isfinite(got).all()
            assert method == "nexus" or relative(got, logits(seed)) < 1e-12, method


def adapter(folder: Path, work: Path) -> None:
    """Assert that `peft` computes with our adapter's files what we compute."""
    from tests.model.lora.test_peft import close, opened, saved

    model, _ = saved(folder, work / "adapter", LoraConfig(rank=3, alpha=12.0))
    tokens = torch.arange(2 * 20).view(2, 20) * 7 % 90 + 3
    with torch.no_grad():
        ours = model.logits(model(tokens))
        close(ours, opened(folder, work / "adapter")(tokens).logits, 1e-5)
        plain = load_causal_lm(folder)
        assert (plain.logits(plain(tokens)) - ours).abs().max() > 1e-3
