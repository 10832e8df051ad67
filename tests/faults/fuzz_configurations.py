"""Fuzz every configuration: each field of each kind, each with every odd value.

A case passes if the configuration opens and its results are finite (and equal to those of `transformers`, if
that opens the folder), or if it ends in one `UserError` line. A traceback, or results that are not finite, is
a bug of ours.

    python -m tests.faults.fuzz_configurations --most 300 --seed 1
"""

from __future__ import annotations

import argparse
import atexit
import copy
import dataclasses
import io
import json
import math
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from koine.data import DataOrder, Mixture
from koine.data.shards import digest_of
from koine.errors import UserError
from koine.model import Decoder, load_model, save_model
from koine.model.config import LayerSpec, MixtureConfig, ModelConfig, hybrid_layers
from tests.bad_inputs import worlds

SECONDS = 60
LONGEST = 40
LEFT_OUT = object()
ODD: dict[str, Any] = {
    "left out": LEFT_OUT,
    "null": None,
    "true": True,
    "false": False,
    "0": 0,
    "1": 1,
    "2": 2,
    "3": 3,
    "-1": -1,
    "100000": 100_000,
    "2^31": 2**31,
    "2^63": 2**63,
    "10^30": 10**30,
    "10^400": 10**400,
    "-10^30": -(10**30),
    "0.0": 0.0,
    "0.5": 0.5,
    "2.0": 2.0,
    "-0.5": -0.5,
    "1e-300": 1e-300,
    "1e-30": 1e-30,
    "1e30": 1e30,
    "1e300": 1e300,
    "NaN": math.nan,
    "infinity": math.inf,
    "-infinity": -math.inf,
    "empty text": "",
    '"false"': "false",
    '"1"': "1",
    "long text": "x" * 100_000,
    "half a pair": "\ud800",
    "NUL": "\0",
    "[]": [],
    "[1]": [1],
    "[null]": [None],
    "{}": {},
    '{"a": 1}': {"a": 1},
    "deep": [[[[[[[[{"a": [1]}]]]]]]]],
}
"""What is put in place of a field."""
FILES = {
    "empty": b"",
    "[]": b"[]",
    "null": b"null",
    "3": b"3",
    "text": b'"x"',
    "{}": b"{}",
    "deep list": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "5,000 digits": b'{"format": ' + b"7" * 5_000 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a pair": b'{"a": "\\ud800"}',
    "cut": b'{"a": [1, 2',
    "twice": b'{"format": 1}{"format": 1}',
}
"""What is put in place of a whole file."""


@dataclass(frozen=True)
class Case:
    """One odd value (by its name) in one place of one configuration."""

    kind: str
    place: tuple[str | int, ...]
    value: str

    def __str__(self) -> str:
        return f"{self.kind}: {'.'.join(map(str, self.place)) or 'the whole file'} = {self.value}"


@dataclass
class Verdict:
    """whole, line, traceback, or silent; with the reason."""

    case: Case
    what: str
    why: str


class SilentError(Exception):
    """A case succeeded and must not have."""


def places(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Return every field of a JSON value, nested ones too.

    Of a list its first entry, of lists as long as a vocabulary two.
    """
    entries: Any = list(value.items()) if isinstance(value, dict) else enumerate(value[:1])
    if isinstance(value, dict) and len(value) > LONGEST:
        entries = entries[:2]
    for key, entry in entries:
        yield (*above, key)
        if isinstance(entry, dict | list):
            yield from places(entry, (*above, key))


def changed(value: Any, place: tuple[str | int, ...], odd: Any) -> Any:
    """Return the value with one field replaced, or left out."""
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if odd is LEFT_OUT:
        del inner[place[-1]]
    else:
        inner[place[-1]] = copy.deepcopy(odd)
    return value


# -- models --------------------------------------------------------------------------------------------------------------


def _config(layers: tuple[LayerSpec, ...], mixture: MixtureConfig | None = None) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, layers=layers, mixture=mixture,
        max_position_embeddings=128, eos_token_id=7,
    )  # fmt: skip


CONFIGURATIONS = {
    "cohere config.json": _config((LayerSpec(),) * 2),
    "cohere2 config.json": _config(hybrid_layers(2, window=4, full_every=2)),
    "koine config.json": _config((LayerSpec(window=4, qk_norm="heads"), LayerSpec(rope=False))),
    "experts config.json": _config(
        (LayerSpec(window=4), LayerSpec(rope=False)),
        MixtureConfig(experts=("a", "b"), shared_expert=True, attention="kv-experts", attention_top_k=1, domain_size=3),
    ),
}  # fmt: skip


def kept_folder() -> Path:
    """Make a temporary folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="koine-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def model_folder(kind: str) -> Path:
    """Return a tiny model of a kind, saved once."""
    folder = kept_folder()
    torch.manual_seed(0)
    model = Decoder(CONFIGURATIONS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    save_model(model, folder)
    return folder


def _base_of_model(kind: str) -> Any:
    value = json.loads((model_folder(kind) / "config.json").read_text())
    # Fields that other writers of these files use.
    return {**value, "rope_theta": 10_000.0, "partial_rotary_factor": 1.0, "sliding_window_pattern": 2}


def try_model(kind: str, value: Any, work: Path) -> None:
    """Open the model with this config.json; compare its logits with those of `transformers`, if possible."""
    for file in model_folder(kind).iterdir():
        if file.name != "config.json":
            (work / file.name).symlink_to(file)
    (work / "config.json").write_text(json.dumps(value))
    model = load_model(work)
    tokens = torch.arange(8, 20)[None]
    with torch.inference_mode():
        ours = model.logits(model(tokens))
    if not torch.isfinite(ours).all():
        raise SilentError("the logits are not finite")
    theirs = (
        _logits_of_transformers(work, tokens) if value.get("model_type") in ("cohere", "cohere2") else None
    )
    if theirs is not None and not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
        raise SilentError(
            f"the logits differ from those of transformers by {(ours - theirs).abs().max():.3g}"
        )


def _logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor | None:
    """Return the logits of `transformers`; None if it cannot open or run the folder."""
    import logging

    from transformers import AutoModelForCausalLM

    logging.disable(logging.CRITICAL)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            logits = model(tokens).logits
    except Exception:  # noqa: BLE001 (another library's opinion of a broken file may take any form)
        return None
    finally:
        logging.disable(logging.NOTSET)
    assert isinstance(logits, torch.Tensor)
    return logits if torch.isfinite(logits).all() else None


# -- training, data, sampling, merging -----------------------------------------------------------------------------------


def _base_of_settings() -> Any:
    from koine.train.settings import TrainSettings

    return TrainSettings(dtype="float32", checkpoint_every=2, seed=1).to_json()


def try_settings(_: str, value: Any, work: Path) -> None:
    """Train two steps; the saved weights must be finite."""
    from koine.train import train
    from koine.train.objectives import LanguageModelling
    from koine.train.settings import TrainSettings

    settings = TrainSettings(**value)
    threads = torch.get_num_threads()
    try:
        torch.manual_seed(0)
        model = Decoder(dataclasses.replace(CONFIGURATIONS["cohere2 config.json"], vocab_size=_vocabulary()))
        data = DataOrder(Mixture.from_json(_base_of_mixture()), verify=False)
        train(model, LanguageModelling(), data, settings, out=work / "out", tokenizer=None, progress=False)
    finally:
        torch.set_num_threads(threads)
    trained = load_model(work / "out")
    if not all(torch.isfinite(parameter).all() for parameter in trained.parameters()):
        raise SilentError("the trained weights are not finite")


@cache
def _vocabulary() -> int:
    from koine.data.shards import TokenSource

    return TokenSource(worlds.built("tokens")).vocab_size


def _base_of_mixture() -> Any:
    source = {
        "name": "tales", "path": str(worlds.built("tokens")), "proportion": 1.0, "languages": {"de": 0.5, "en": 0.5}, "max_epochs": 1000.0,
    }  # fmt: skip
    long = {"every": 2, "sequence_length": 64, "batch_size": 1, "sources": [{**source, "min_tokens": 2}]}
    other = {**{key: entry for key, entry in source.items() if key != "languages"}, "temperature": 2.0}
    return {
        "phases": [
            {"name": "a", "steps": 2, "sources": [source], "sequence_length": 16, "batch_size": 2, "long": long},
            {"name": "b", "steps": 1, "sources": [other]},
        ],
        "sequence_length": 16,
        "batch_size": 2,
        "seed": 3,
        "packing": "concat",
        "cross_document_attention": False,
    }  # fmt: skip


def try_mixture(_: str, value: Any, work: Path) -> None:
    """Draw the first and the last batch."""
    mixture = Mixture.from_json(json.loads(json.dumps(value)), where="mixture.json", relative_to=work)
    order = DataOrder(mixture, verify=False)
    for step in {0, mixture.steps - 1}:
        shape = mixture.shape(step)
        # A row of what a user with a cluster may ask for: one alone is drawn here.
        rows = slice(0, 1) if shape.tokens > 2**20 else None
        if shape.sequence_length > 2**22:
            continue
        batch = order.batch(step, micro_batch=rows)
        if batch.tokens.shape[1] != shape.sequence_length or int(batch.tokens.max()) >= _vocabulary():
            raise SilentError(f"a batch of {tuple(batch.tokens.shape)} for {shape}")


def _base_of_sampling(kind: str) -> Any:
    from koine.generate.sampling import Sampling

    return {
        **dataclasses.asdict(Sampling(max_new_tokens=3, seed=1)), "stop": ("x",), "json_schema": {"type": "object"},
    }  # fmt: skip


def try_sampling(kind: str, value: Any, work: Path) -> None:
    """Generate a few tokens."""
    from koine.generate.batch import generate
    from koine.generate.sampling import Sampling

    sampling = dataclasses.replace(Sampling(**value), stop=(), json_schema=None)
    few = dataclasses.replace(sampling, max_new_tokens=min(3, sampling.max_new_tokens))
    (request,) = generate(load_model(model_folder("cohere config.json")), [[5, 8]], few)
    if not all(0 <= token < 64 for token in request.tokens):
        raise SilentError(f"the tokens {request.tokens}")


def _base_of_recipe(kind: str) -> Any:
    options = {"slerp": {"t": 0.5}, "linear": {"weights": [0.5, 0.5]}}
    mine = options.get(kind.split()[1], {"weights": [0.5, 0.5], "density": 0.5, "scale": 1.0})
    return {**mine, "tokenizer": "first", "dtype": "float32", "max-shard-size": "5GB", "threads": 1}


def try_recipe(kind: str, value: Any, work: Path) -> None:
    """Merge two tiny models with the command's options, and check the tensors."""
    from safetensors.torch import load_file

    from koine.cli.main import cli

    method = kind.split()[1]
    words = [
        "merge",
        method,
        str(worlds.built("model")),
        str(worlds.built("branch")),
        "--out",
        str(work / "out"),
    ]
    if method == "ties":
        words += ["--base", str(worlds.built("model"))]
    for name, entry in value.items():
        text = ",".join(map(str, entry)) if isinstance(entry, list) else str(entry)
        words += [f"--{name}", text.replace("\ud800", "?").replace("\0", "?")]
    cli.main(words, standalone_mode=False)
    for file in (work / "out").glob("*.safetensors"):
        if not all(torch.isfinite(tensor).all() for tensor in load_file(file).values()):
            raise SilentError("the merged weights are not finite")


# -- files that commands of ours write and read --------------------------------------------------------------------------


def _copied(name: str, work: Path) -> Path:
    folder = work / name
    if not folder.exists():
        shutil.copytree(_built(name), folder)
    return folder


def _open_tokens(work: Path) -> None:
    mixture = _base_of_mixture()
    for phase in mixture["phases"]:
        for source in [*phase["sources"], *phase.get("long", {}).get("sources", [])]:
            source["path"] = str(work / "tokens")
    order = DataOrder(Mixture.from_json(mixture))
    order.batch(0)
    next(iter(order.sources.values())).info(0)


def _at_step(work: Path) -> None:
    from koine.data.inspect_step import documents_at_step

    documents_at_step(work / "trained", 1)


def _resume(work: Path) -> None:
    worlds.run_koine(
        *worlds.TRAIN, "--data", str(worlds.built("tokens")), "--tokenizer", str(worlds.built("tokenizer")), "--out",
        str(next(path for path in (work / "trained", work / "halfway") if path.exists())),
    )  # fmt: skip


def _open_tokenizer(work: Path) -> None:
    from koine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(work / "tokenizer")
    tokenizer.encode_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def _open_index(work: Path) -> None:
    load_model(work / "model")


def _merge_with_its_tokenizer(work: Path) -> None:
    from koine.cli.main import cli

    words = ["merge", "linear", str(work / "model"), str(worlds.built("branch")), "--tokenizer", "first"]
    cli.main([*words, "--out", str(work / "merged")], standalone_mode=False)


def _remove_expert(work: Path) -> None:
    from koine.combine.moe.add_expert import averaged_parts, remove_expert
    from koine.combine.moe.upcycle import read_record

    averaged_parts(read_record(work / "mixture"))
    remove_expert(work / "mixture", "code", work / "smaller", dense=worlds.built("branch"))


def _read_folder(work: Path) -> None:
    from koine.data import read_records

    (work / "texts").mkdir(exist_ok=True)
    (work / "texts" / "data-0.arrow").write_bytes(b"")
    list(read_records(work / "texts"))


READERS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "manifest.json": ("tokens", "manifest.json", _open_tokens),
    "training.json (at-step)": ("trained", "training.json", _at_step),
    "training.json (train again)": ("trained", "training.json", _resume),
    "checkpoint.json": ("halfway", "checkpoints/*/checkpoint.json", _resume),
    "tokenizer_config.json": ("tokenizer", "tokenizer_config.json", _open_tokenizer),
    "special_tokens_map.json": ("tokenizer", "special_tokens_map.json", _open_tokenizer),
    "tokenizer.json": ("tokenizer", "tokenizer.json", _open_tokenizer),
    "model.safetensors.index.json": ("model", "model.safetensors.index.json", _open_index),
    "generation_config.json": ("model", "generation_config.json", _merge_with_its_tokenizer),
    "mixture.json of experts": ("mixture", "mixture.json", _remove_expert),
    "artifact.json (report)": ("run", "[a-z]*/*/artifact.json", lambda work: _report(work)),
    "artifact.json (lineage)": ("run", "[a-z]*/*/artifact.json", lambda work: _lineage(work)),
    "plan.json (report)": ("run", "plan.json", lambda work: _report(work)),
    "report.json (report)": ("run", "[a-z]*/*/report.json", lambda work: _report(work)),
    "state.json": ("", "texts/state.json", _read_folder),
}
NEW_FILES = {
    "model.safetensors.index.json": {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model.safetensors"},
    },
    "state.json": {"_data_files": [{"filename": "data-0.arrow"}]},
}


@cache
def run_folder() -> Path:
    """Return a finished run with two artifacts; the figures are made up."""
    from tests.plan.sample_run import write_sample_run

    return write_sample_run(kept_folder() / "run")


def _report(work: Path) -> None:
    worlds.run_koine("report", str(work / "run"), "--out", str(work / "page.html"))


def _lineage(work: Path) -> None:
    artifact = next(path.parent for path in sorted((work / "run").glob("[a-z]*/*/artifact.json")))
    worlds.run_koine("lineage", str(artifact))


def _built(name: str) -> Path:
    return run_folder() if name == "run" else worlds.built(name)


def _file(kind: str, work: Path) -> Path:
    name, inside, _ = READERS[kind]
    folder = _copied(name, work) if name else work
    found = next(iter(sorted(folder.glob(inside))), folder / inside)
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


@cache
def _base_of_file(kind: str) -> Any:
    if kind in NEW_FILES:
        return NEW_FILES[kind]
    name, inside, _ = READERS[kind]
    return json.loads(next(iter(sorted(_built(name).glob(inside)))).read_text())


def try_file(kind: str, value: Any, work: Path) -> None:
    """Run the command that reads the file."""
    if kind == "manifest.json" and isinstance(value, dict):
        # Changed by hand it is found by its own hash: here whoever wrote it meant it so.
        with suppress(UnicodeEncodeError):
            value = {**value, "sha256": digest_of(value)}
    _file(kind, work).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    READERS[kind][2](work)


# -- all -----------------------------------------------------------------------------------------------------------------

MERGES = ("merge linear", "merge slerp", "merge ties")
SAMPLINGS = ("sampling",)
KINDS: dict[str, tuple[Callable[[], Any], Callable[[str, Any, Path], None]]] = {
    **{kind: (lambda kind=kind: _base_of_model(kind), try_model) for kind in CONFIGURATIONS},  # type: ignore[misc]
    "training settings": (_base_of_settings, try_settings),
    "mixture.json of data": (_base_of_mixture, try_mixture),
    **{kind: (lambda kind=kind: _base_of_sampling(kind), try_sampling) for kind in SAMPLINGS},  # type: ignore[misc]
    **{kind: (lambda kind=kind: _base_of_recipe(kind), try_recipe) for kind in MERGES},  # type: ignore[misc]
    **{kind: (lambda kind=kind: _base_of_file(kind), try_file) for kind in READERS},  # type: ignore[misc]
}


def cases(only: str = "") -> list[Case]:
    """Return every case, in order."""
    found = []
    for kind, (base, _) in KINDS.items():
        if only and only not in kind:
            continue
        if kind in READERS:
            found += [Case(kind, (), name) for name in FILES]
        for place in places(base()):
            found += [Case(kind, place, name) for name in ODD]
    return found


class _Late(Exception):  # noqa: N818
    """The case does not end."""


def _late(*_: object) -> None:
    raise _Late


def judge(case: Case) -> Verdict:
    """Run one case in its own folder."""
    base, attempt = KINDS[case.kind]
    value = changed(base(), case.place, ODD[case.value]) if case.place else FILES[case.value]
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="koine-fuzz-"))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for redirect in (redirect_stdout, redirect_stderr):
                stack.enter_context(redirect(io.StringIO()))
            attempt(case.kind, value, Path(folder))
    except UserError as error:
        line = str(error)
        whole = line.isprintable() and len(line) < 2000
        return Verdict(
            case, "line" if whole else "silent", line if whole else f"no good line: {line[:200]!r}"
        )
    except SilentError as error:
        return Verdict(case, "silent", str(error))
    except _Late:
        return Verdict(case, "traceback", f"did not end within {SECONDS} s")
    except SystemExit as error:
        return Verdict(case, "line" if error.code == 2 else "traceback", f"exit code {error.code}")
    except BaseException as error:
        if type(error).__module__.startswith("click"):
            return Verdict(case, "line", str(error))
        if isinstance(error, KeyboardInterrupt):
            raise
        trace = traceback.extract_tb(error.__traceback__)
        ours = next((frame for frame in reversed(trace) if "/src/koine/" in frame.filename), trace[-1])
        where = f"{Path(ours.filename).name}:{ours.lineno}"
        return Verdict(case, "traceback", f"{type(error).__name__} at {where}: {str(error)[:200]}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Verdict(case, "whole", "")


SLOW = " (report)"
"""Of kinds that take seconds a case."""


def chosen(most: int | None, seed: int, only: str = "", *, slow: bool = True) -> list[Case]:
    """Return all cases, or a random part of each kind, at least one.

    slow: also those that take seconds.
    """
    everything = [case for case in cases(only) if slow or SLOW not in case.kind]
    if most is None or most >= len(everything):
        return everything
    draw = random.Random(seed)
    by_kind: dict[str, list[Case]] = {}
    for case in everything:
        by_kind.setdefault(case.kind, []).append(case)
    found = []
    for of_kind in by_kind.values():
        found += draw.sample(of_kind, max(1, most * len(of_kind) // len(everything)))
    return found


def run(
    selection: list[Case], *, until: float = math.inf, say: bool = False
) -> tuple[Counter[str], list[Verdict]]:
    """Run cases in order; return counts of verdicts, and the cases that are bugs."""
    counts: Counter[str] = Counter()
    wrong = []
    for case in selection:
        if time.monotonic() > until:
            break
        verdict = judge(case)
        counts[verdict.what] += 1
        if verdict.what in ("traceback", "silent"):
            wrong.append(verdict)
            if say:
                print(f"{verdict.what}: {case}: {verdict.why}", flush=True)
    return counts, wrong


def summary(counts: Counter[str]) -> str:
    """Return the summary line."""
    return (
        f"cases {sum(counts.values())}, whole {counts['whole']}, one clear line {counts['line']}, "
        f"traceback {counts['traceback']}, silent {counts['silent']}"
    )


def main(words: list[str] | None = None) -> int:
    """Run the command line. The exit code is 0 if there is neither a traceback nor silence."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz_configurations", description=__doc__)
    parser.add_argument("--most", type=int, help="so many cases, drawn by the seed [all]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--minutes", type=float, default=math.inf)
    given = parser.parse_args(words)
    selection = chosen(given.most, given.seed, given.only)
    counts, wrong = run(selection, until=time.monotonic() + 60 * given.minutes, say=True)
    print(summary(counts))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
