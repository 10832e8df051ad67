"""Folders that bad inputs start from: small and sound, then damaged by each case."""

from __future__ import annotations

import atexit
import errno
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

TEXTS = {
    "de": "Die Katze schläft auf dem warmen Dach, und der Hund wacht. ",
    "en": "The cat sleeps on the warm roof, and the dog keeps watch. ",
}


def records(count: int = 20) -> list[dict[str, Any]]:
    """Return sound documents in two languages."""
    return [
        {"id": f"{code}-{number}", "text": TEXTS[code] * 4 + str(number), "language": code, "domain": "tale"}
        for number in range(count)
        for code in TEXTS
    ]


def write_lines(path: Path, lines: list[Any]) -> None:
    """Write JSON Lines; strings are written unchanged."""
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def good_text(folder: Path) -> None:
    write_lines(folder / "text.jsonl", records())


def text_with(*lines: Any) -> Callable[[Path], None]:
    """Write a text.jsonl of exactly these lines."""
    return lambda folder: write_lines(folder / "text.jsonl", list(lines))


def cut_gzip(folder: Path) -> None:
    whole = gzip.compress("\n".join(json.dumps(record) for record in records()).encode())
    (folder / "text.jsonl.gz").write_bytes(whole[: len(whole) // 2])


def cut_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records()), folder / "text.parquet")
    whole = (folder / "text.parquet").read_bytes()
    (folder / "text.parquet").write_bytes(whole[: len(whole) // 2])


def latin_1_text(folder: Path) -> None:
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records())
    (folder / "text.jsonl").write_bytes(lines.encode("latin-1"))


@cache
def built(name: str) -> Path:
    """Return a sound folder `name`, built once; cases copy it."""
    folder = Path(tempfile.mkdtemp(prefix=f"koine-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    BUILDERS[name](folder / name)
    return folder / name


def having(*names: str, then: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    """Prepare a case: copies of sound folders (`tokenizer`, `tokens`, `model`, ...), damaged by `then`."""

    def prepare(folder: Path) -> None:
        for name in names:
            if name == "text":
                good_text(folder)
            else:
                shutil.copytree(built(name), folder / name)
        if then:
            then(folder)

    return prepare


def build_tokenizer(out: Path, *, merges: int = 0) -> None:
    from koine.tokenizer import train_tokenizer
    from koine.tokenizer.special import SMALLEST_VOCABULARY

    train_tokenizer(
        {code: (lambda text=text: [text]) for code, text in TEXTS.items()},  # type: ignore[misc]
        vocab_size=SMALLEST_VOCABULARY + merges,
        min_frequency=2,
        scheme="natural",
        english_share=None,
    ).save(out)


def run_koine(*arguments: str) -> None:
    """Run a sound command in this process."""
    from koine.cli.main import cli

    cli.main(list(arguments), standalone_mode=False)


def build_tokens(out: Path) -> None:
    good_text(out.parent)
    run_koine(
        "data", "tokenize", str(out.parent / "text.jsonl"), "--tokenizer", str(built("tokenizer")), "--out", str(out),
        "--workers", "1",
    )  # fmt: skip


PAIRS = (
    {"prompt": "Is the river long?", "chosen": "It is nine miles long.", "rejected": "No.", "language": "en"},
    {
        "prompt": "Where does it end?",
        "chosen": "In the sea.",
        "rejected": "Nowhere at all.",
        "language": "en",
    },
    {"prompt": "Wie hoch ist der Berg?", "chosen": "Sehr hoch.", "rejected": "Berg.", "language": "de"},
)


def build_pairs(out: Path) -> None:
    """Build token shards of preferences."""
    source = out.with_name("pairs.jsonl")
    source.write_text("".join(json.dumps(one) + "\n" for one in PAIRS), encoding="utf-8")
    run_koine(
        "data", "tokenize", str(source), "--tokenizer", str(built("tokenizer")), "--kind", "preferences",
        "--out", str(out),
    )  # fmt: skip


def build_model(out: Path) -> None:
    """Build a model with random weights: errors of a model directory do not depend on what was learnt."""
    import torch

    from koine.model import Decoder, preset, save_model
    from koine.tokenizer import load_tokenizer

    torch.manual_seed(0)
    config = preset("koine-0.5m", load_tokenizer(built("tokenizer")).vocab_size)
    save_model(Decoder(config), out, tokenizer=built("tokenizer"))


def build_reward(out: Path) -> None:
    """Build a reward model with random weights."""
    from koine.model.reward_model import start_reward_model

    start_reward_model(built("model")).save(out, tokenizer=built("tokenizer"))


def build_exportable(out: Path) -> None:
    """Build a model as `build_model`, with a tokenizer of two merges: llama.cpp needs some."""
    from koine.model import Decoder, preset, save_model
    from koine.tokenizer import load_tokenizer

    folder = out.with_name("tokenizer-with-merges")
    build_tokenizer(folder, merges=2)
    config = preset("koine-0.5m", load_tokenizer(folder).vocab_size)
    save_model(Decoder(config), out, tokenizer=folder)


def build_gguf(out: Path) -> None:
    """Build a folder with `model.gguf`: a model as llama.cpp has it."""
    from koine.model.formats.gguf import export_gguf

    out.mkdir()
    export_gguf(built("exportable"), out / "model.gguf")


def build_pickled(out: Path) -> None:
    """Build a folder with a Llama as `pytorch_model.bin`, in two shards."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    out.mkdir()
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(config).state_dict()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    names = sorted(state)
    weight_map = {}
    for number, held in enumerate((names[:5], names[5:]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in held}, out / file)
        weight_map |= dict.fromkeys(held, file)
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def build_branch(out: Path) -> None:
    """Build a branch: the model with a little added to every weight."""
    import torch

    from koine.model import load_model, save_model

    model = load_model(built("model"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))
    save_model(model, out, tokenizer=built("tokenizer"))


def build_adapter(out: Path) -> None:
    """Build a LoRA adapter of `model` with random weights."""
    import torch

    from koine.model import LoraConfig, add_lora, load_model

    model = load_model(built("model"))
    adapter = add_lora(model, LoraConfig(rank=2), base=built("model"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.01)
    adapter.save(out, dict(model.named_parameters()))


def build_unrelated(out: Path) -> None:
    """Build a model of the same shape from other random weights."""
    import torch

    from koine.model import Decoder, save_model
    from koine.model.formats.config_json import read_config

    torch.manual_seed(2)
    save_model(Decoder(read_config(built("model"))), out, tokenizer=built("tokenizer"))


def family_model(model_type: str) -> Callable[[Path], None]:
    """Build a small model of one of the classes of `transformers`, of one shape for all classes."""

    def build(out: Path) -> None:
        import torch

        from koine.model import Decoder, save_model
        from koine.model.formats.config_json import from_json
        from koine.tokenizer import load_tokenizer

        fields = {
            "model_type": model_type, "vocab_size": load_tokenizer(built("tokenizer")).vocab_size,
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64, "rope_theta": 10_000.0, "tie_word_embeddings": True,
        }  # fmt: skip
        torch.manual_seed(0)
        save_model(Decoder(from_json(fields, where=out / "config.json")), out, tokenizer=built("tokenizer"))

    return build


def build_mixture(out: Path) -> None:
    run_koine(
        "upcycle",
        "btx",
        "--seed-model",
        str(built("model")),
        "--experts",
        f"code={built('branch')}",
        "--out",
        str(out),
    )


def build_trained(out: Path) -> None:
    run_koine(
        *TRAIN, "--data", str(built("tokens")), "--tokenizer", str(built("tokenizer")), "--out", str(out)
    )


def build_halfway(out: Path) -> None:
    """Build a training that was stopped after its first step, with a checkpoint."""
    import pytest

    from koine.train.signals import Interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupt, "__init__", lambda self: setattr(self, "signal", 15))
        with pytest.raises(SystemExit):
            build_trained(out)


TRAIN = (
    "train",
    "pretrain",
    "--preset",
    "koine-0.5m",
    "--steps",
    "2",
    "--batch-size",
    "2",
    "--sequence-length",
    "32",
)
BUILDERS: dict[str, Callable[[Path], None]] = {
    "tokenizer": build_tokenizer,
    "tokens": build_tokens,
    "pairs": build_pairs,
    "model": build_model,
    "reward": build_reward,
    "exportable": build_exportable,
    "gguf": build_gguf,
    "pickled": build_pickled,
    "branch": build_branch,
    "adapter": build_adapter,
    "unrelated": build_unrelated,
    "llama": family_model("llama"),
    "qwen": family_model("qwen3"),
    "mixture": build_mixture,
    "trained": build_trained,
    "halfway": build_halfway,
}


def flip_byte(path: str, position: int = -2) -> Callable[[Path], None]:
    """Change one byte of a file; negative positions count from its end."""

    def flip(folder: Path) -> None:
        content = bytearray((folder / path).read_bytes())
        content[position] ^= 0xFF
        (folder / path).write_bytes(content)

    return flip


def cut(path: str) -> Callable[[Path], None]:
    """Keep the first half of a file."""

    def halve(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (folder / path).write_bytes(content[: len(content) // 2])

    return halve


def written(path: str, content: str) -> Callable[[Path], None]:
    """Write a file (and the folders above it) with this content."""

    def write(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")

    return write


def changed_tensors(path: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Change the tensors of a safetensors file."""

    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / path)
        change(tensors)
        save_file(tensors, folder / path)

    return apply


def other_shape(path: str) -> Callable[[Path], None]:
    import torch

    return changed_tensors(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))


def with_nan(path: str) -> Callable[[Path], None]:
    return changed_tensors(path, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


def inside_another(folder: Path) -> None:
    """Build `multimodal`: the model under the names of a multimodal checkpoint's language model.

    A norm of each layer is left out.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "model", folder / "multimodal")
    stored = load_file(folder / "model" / "model.safetensors")
    kept = {
        f"language_model.{name}": tensor for name, tensor in stored.items() if "input_layernorm" not in name
    }
    save_file(kept, folder / "multimodal" / "model.safetensors")


def removed(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def renamed(path: str, to: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        (folder / path).rename(folder / to)

    return rename


def edited_json(path: str, **changes: Any) -> Callable[[Path], None]:
    """Change fields of a JSON file; None removes one."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / path).read_text())
        value.update(changes)
        value = {key: entry for key, entry in value.items() if entry is not None}
        (folder / path).write_text(json.dumps(value))

    return edit


def marked_inside(path: str, prefix: str) -> Callable[[Path], None]:
    """A BPE tokenizer that marks tokens inside a word."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / path).read_text())
        value["model"]["continuing_subword_prefix"] = prefix
        (folder / path).write_text(json.dumps(value))

    return edit


def both(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for step in steps:
            step(folder)

    return prepare


def full_disk(patch: Any) -> None:
    """Let fsync report that no block is left, as a full disk does."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr("os.fsync", fsync)


def unreadable(name: str) -> Callable[[Any], None]:
    """Refuse to open a file called `name`; the tests may run as a user with all permissions."""

    def during(patch: Any) -> None:
        import builtins
        import io

        original = io.open

        def refuse(file: Any, *arguments: Any, **named: Any) -> Any:
            if str(file).endswith(name):
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return original(file, *arguments, **named)

        patch.setattr(io, "open", refuse)
        patch.setattr(builtins, "open", refuse)

    return during


def add_tokens(path: str) -> Callable[[Path], None]:
    """Add ids to a tokenizer beyond its model's embeddings."""

    def add(folder: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / path))
        tokenizer.add_tokens([f"word-{number}" for number in range(8)])
        tokenizer.save(str(folder / path))

    return add


def _forget(patch: Any, name: str) -> None:
    import sys

    for module in [module for module in sys.modules if module == name or module.startswith(name + ".")]:
        patch.delitem(sys.modules, module)


class _Refuse:
    """Import hook that fails for one package, as an installation without its files does."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.name or name.startswith(self.name + "."):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def half_installed(name: str) -> Callable[[Any], None]:
    """Simulate a package with metadata but without files."""

    def during(patch: Any) -> None:
        import sys

        _forget(patch, name)
        patch.setattr(sys, "meta_path", [_Refuse(name), *sys.meta_path])

    return during


def without_package(name: str) -> Callable[[Any], None]:
    """Simulate a package that is not installed."""

    def during(patch: Any) -> None:
        import importlib.metadata
        import importlib.util

        half_installed(name)(patch)
        distribution, find_spec = importlib.metadata.distribution, importlib.util.find_spec

        def hidden_distribution(wanted: str) -> Any:
            if wanted == name:
                raise importlib.metadata.PackageNotFoundError(wanted)
            return distribution(wanted)

        def hidden_spec(wanted: str, package: str | None = None) -> Any:
            return None if wanted.partition(".")[0] == name else find_spec(wanted, package)

        patch.setattr(importlib.metadata, "distribution", hidden_distribution)
        patch.setattr(importlib.util, "find_spec", hidden_spec)

    return during


def write_mixture(**changes: Any) -> Callable[[Path], None]:
    """Write a sound mixture.json of one phase and one source, with these changes.

    source: changes of the source's fields.
    """

    def write(folder: Path) -> None:
        source = {"name": "tales", "path": "tokens", "proportion": 1.0, **changes.get("source", {})}
        phase = {"name": "pretrain", "steps": 2, "sources": [source, *changes.get("more", [])]}
        mixture = {"phases": [phase], "sequence_length": 32, "batch_size": 2, "seed": 0, "packing": "concat"}
        mixture.update({key: value for key, value in changes.items() if key not in ("source", "more")})
        (folder / "mixture.json").write_text(json.dumps(mixture))

    return write


_held: Any = None


def locked(path: str) -> Callable[[Any], None]:
    """Hold a lock file in another process."""

    def during(patch: Any) -> None:
        import sys

        from filelock import FileLock

        lock = FileLock(path)
        lock.acquire()
        # Given up when the patch is undone and nothing refers to it any more.
        patch.setattr(sys.modules[__name__], "_held", lock)

    return during


def spoil_checkpoint(folder: Path) -> None:
    """Change one byte in the largest file of the latest checkpoint."""
    latest = max((folder / "halfway" / "checkpoints").iterdir())
    largest = max(
        (path for path in latest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    flip_byte(str(largest.relative_to(folder)))(folder)


def shrink_vocabulary(folder: Path) -> None:
    """Give a model fewer ids than the tokens have."""
    import torch

    from koine.model import Decoder, preset, save_model

    shutil.rmtree(folder / "model")
    torch.manual_seed(0)
    save_model(Decoder(preset("koine-0.5m", 200)), folder / "model", tokenizer=built("tokenizer"))


def standard_input(content: bytes) -> Callable[[Any], None]:
    """Give a command this standard input."""

    def during(patch: Any) -> None:
        import io
        import sys

        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return during
