"""The steps that profile models: figures by language, speed by context length, and the page about both."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.allocator import keep_freed_memory
from koine.files import read_json, write_json
from koine.plan import step
from koine.plan.run.progress import report
from koine.steps import checks, estimates
from koine.steps.corpus_files import write_step_report
from koine.steps.profile_report import model_blocks, profile_blocks
from koine.steps.profile_text import about_text, read_profile_texts

if TYPE_CHECKING:
    from koine.model import LanguageModel

PROFILE, SPEED = "profile.json", "speed.json"


@step(version="1", estimate=estimates.profile_model, check=checks.profile_model, threads=0)
def profile_model(
    text: Path, model: Path, *, primary_languages: tuple[str, ...], dtype: str, seed: int, out: Path
) -> None:
    """Measure tokens, split letters and bits per byte of a model in each language; write `profile.json`."""
    from koine.evaluate.language_profile import profile_languages, scripts_of
    from koine.evaluate.runner import load_for_evaluation
    from koine.generate.cpu.prepacked_linear import prepack
    from koine.hardware import chosen_device
    from koine.model import Decoder

    device = chosen_device("auto")
    loaded, tokenizer = load_for_evaluation(model, device=device, dtype=dtype)
    about = describe_model(loaded, tokenizer.vocab_size)
    if isinstance(loaded, Decoder):
        prepack(loaded)
    rows = profile_languages(
        loaded,
        tokenizer,
        read_profile_texts(text),
        primary=primary_languages,
        device=device,
        seed=seed,
        progress=report,
    )
    result = {
        "model": about,
        "conditions": conditions(dtype, device),
        "text": about_text(text),
        "primary_languages": [code for code, row in rows.items() if row["is_primary"]],
        "languages": rows,
        "scripts": scripts_of(rows),
    }
    write_json(out / PROFILE, result)
    levels = [row["level"] for row in rows.values()]
    metrics = {f"languages_{level.replace(' ', '_')}": levels.count(level) for level in dict.fromkeys(levels)}
    write_json(out / "metrics.json", metrics)
    write_step_report(out, "Languages", model_blocks(result))


def describe_model(model: LanguageModel, vocabulary: int) -> dict[str, Any]:
    """Return the size of a model, counted before its weights are packed."""
    from torch import nn

    assert isinstance(model, nn.Module)
    return {
        "architecture": model.architecture,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "context_length": model.context_length,
        "vocabulary_size": vocabulary,
    }


def conditions(dtype: str, device: str) -> dict[str, Any]:
    """Return what figures depend on besides model and text: processor, threads, precision, versions."""
    import importlib.metadata

    import torch

    from koine.hardware import processor_name, versions

    found = versions()
    packages = {name: found[name] for name in ("koine", "torch", "tokenizers")}
    try:
        packages["transformers"] = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        packages["transformers"] = "not installed"
    name = processor_name() if device == "cpu" else torch.cuda.get_device_name(device)
    return {
        "processor": name,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "versions": packages,
    }


@step(version="1", estimate=estimates.profile_speed, check=checks.profile_speed, threads=0)
def measure_speed(
    text: Path,
    models: dict[str, Path],
    profiles: dict[str, Path],
    *,
    lengths: tuple[int, ...],
    repeats: int,
    max_seconds: float,
    dtype: str,
    out: Path,
) -> None:
    """Measure speed and KV cache of each model, one after another; write `speed.json`.

    profiles: nothing is read of them. They are inputs so that nothing else runs while speed is measured.
    """
    import gc

    from koine.generate.local_engine import LocalEngine
    from koine.generate.speed import measure_lengths
    from koine.hardware import chosen_device

    keep_freed_memory()
    device = chosen_device("auto")
    texts = [one.text for one in read_profile_texts(text)]
    result = {}
    for name, model in models.items():
        engine = LocalEngine(model, dtype=dtype, device=device)
        ids = [token for ids in engine.tokenizer.encode_batch(texts) for token in ids]
        found = measure_lengths(engine, ids, lengths, repeats=repeats, max_seconds=max_seconds)
        result[name] = [asdict(one) for one in found]
        del engine
        gc.collect()
    write_json(out / SPEED, {"conditions": conditions(dtype, device), "models": result})


@step(version="1", estimate=estimates.comparison)
def compare_profiles(profiles: dict[str, Path], speed: Path, *, out: Path) -> None:
    """Write the page: a verdict for each language, tables and charts; and `results.json`."""
    read = {name: read_json(folder / PROFILE) for name, folder in profiles.items()}
    speeds = read_json(speed / SPEED)
    write_json(out / "results.json", {"models": read, "speed": speeds})
    write_step_report(out, "How well is each language served?", profile_blocks(read, speeds))
