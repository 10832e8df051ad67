"""`koine model`: describe presets and models, import and export models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koine import hub
from koine.cli.answers import print_answer
from koine.cli.arguments import MODEL, PRESET_OR_MODEL, model_argument
from koine.cli.attention_options import attention_options
from koine.cli.groups import HelpGroup
from koine.cli.model_import import import_command
from koine.cli.outputs import (
    OVERWRITE,
    OutputFile,
    OutputFolder,
    check_binary,
    check_folder,
    print_to_standard_error,
    say_written,
)
from koine.cli.recording import recorded_output
from koine.errors import UserError
from koine.terminal import note


@click.group(cls=HelpGroup)
def model() -> None:
    """Describe presets and model directories; import and export models."""


model.add_command(import_command)


@model.command()
@click.argument("which", type=PRESET_OR_MODEL, metavar="[PRESET|DIRECTORY]", required=False)
@click.option(
    "--vocab-size", type=click.IntRange(min=1), help="Vocabulary size in place of the preset's own."
)
@click.option(
    "--length",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Sequence length for the FLOPs per token.",
)
@attention_options
def describe(which: str | None, vocab_size: int | None, length: int, **attention: Any) -> None:
    """Print parameters, FLOPs per token and bytes of KV cache; without an argument, the presets."""
    from rich.table import Table

    from koine.cli.tables import print_table
    from koine.model.presets import PRESETS, preset
    from koine.model.summary import describe_config

    if which is None:
        table = Table("preset", "parameters", "layers", "hidden", "vocabulary", box=None)
        presets = [
            {
                "preset": name,
                "parameters": describe_config(preset(name))["parameters"]["total"],
                "layers": size.layers,
                "hidden_size": size.hidden,
                "vocab_size": size.vocab_size,
            }
            for name, size in PRESETS.items()
        ]
        for one in presets:
            name, total, layers, hidden, vocabulary = one.values()
            table.add_row(str(name), f"{total:,}", str(layers), str(hidden), f"{vocabulary:,}")
        print_answer({"presets": presets}, lambda: print_table(table))
        return
    folder = model_argument(Path(which), hub.CONFIGURATION)
    if folder.is_dir():
        from koine.model.formats.config_json import read_config

        if vocab_size is not None:
            raise UserError(
                "--vocab-size is for presets", where=which, hint="a model's vocabulary is in its config.json"
            )
        given = [name for name, value in attention.items() if value is not None]
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')} is for presets",
                where=which,
                hint="a model's attention is in its config.json",
            )
        config = read_config(folder)
    elif "/" in which:
        raise UserError("no such model directory", where=which, hint="give a folder that holds config.json")
    else:
        config = preset(which, vocab_size, **attention)
    description = describe_config(config, length=length)
    table = Table(box=None, show_header=False, title=f"{which}", title_justify="left")
    table.add_column(justify="left")
    table.add_column(justify="right")
    for label, value in rows(description):
        table.add_row(label, value)
    print_answer(description, lambda: print_table(table))


def rows(description: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the printed lines: label and value."""
    parameters, flops, cache = (
        description["parameters"],
        description["flops_per_token"],
        description["cache_bytes"],
    )
    lines = [
        ("saved as", description["model_type"]),
        ("attention", description["attention"]),
        ("layers", description["layers"]),
        ("parameters", f"{parameters['total']:,}"),
        ("  of these in the embedding", f"{parameters['embedding'] + parameters['head']:,}"),
        ("  of these elsewhere", f"{parameters['non_embedding']:,}"),
        (f"FLOPs per token, forward, at {description['length']:,}", f"{flops['forward']:,.0f}"),
        (f"FLOPs per token, training, at {description['length']:,}", f"{flops['training']:,.0f}"),
        ("bytes of KV cache per token (bfloat16, before a window is full)", f"{cache['per_token']:,}"),
    ]
    for name in ("8k", "128k"):
        lines.append(
            (
                f"bytes of KV cache at {name}",
                f"{cache[name]:,} ({cache[name + '_share_of_all_full']:.3f} of all full layers)",
            )
        )
    return lines


@model.command()
@click.argument("directory", metavar="MODEL|CHECKPOINT", type=MODEL)
@click.option(
    "--format",
    "kind",
    type=click.Choice(("gguf", "safetensors")),
    required=True,
    help="gguf: a file for llama.cpp; safetensors: a model directory from a training checkpoint.",
)
@click.option(
    "--out",
    type=OutputFile(),
    required=True,
    help="File to write; for safetensors, the folder.",
)
@OVERWRITE
@click.option(
    "--dtype",
    type=click.Choice(("float32", "float16", "bfloat16", "q8_0")),
    help="Data type of the matrices (norms in GGUF stay float32).  [default: as stored]",
)
def export(directory: Path, kind: str, out: Path, overwrite: bool, dtype: Any) -> None:
    """Export MODEL to GGUF, or a training checkpoint (OUT/checkpoints/step-N) to a model directory.

    A checkpoint of a LoRA adapter becomes a PEFT adapter.
    """
    if kind == "safetensors":
        check_folder(out)
        if dtype == "q8_0":
            raise UserError("safetensors hold no q8_0", hint="choose float32, float16 or bfloat16")
        import torch

        from koine.train.export import export_checkpoint

        with recorded_output(out, {"checkpoint": directory}):
            export_checkpoint(
                directory, out, dtype=None if dtype is None else getattr(torch, dtype), overwrite=overwrite
            )
        print_answer({"written": out}, lambda: note(f"written to {out}"))
        return
    from koine.model.formats.gguf import export_gguf

    check_binary(out)
    print_to_standard_error([out])
    export_gguf(directory, out, dtype=dtype, overwrite=overwrite)
    size = out.stat().st_size if out.is_file() else None
    print_answer(
        {"written": out, "bytes": size},
        lambda: say_written(out) if size is None else note(f"{out}: {size:,} bytes"),
    )


@model.command("merge-adapter")
@click.argument("base", type=MODEL)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--out", type=OutputFolder(), required=True, help="Folder to write to.")
@OVERWRITE
@click.option(
    "--dtype",
    type=click.Choice(("float32", "float16", "bfloat16")),
    help="Data type of the weights.  [default: as in BASE]",
)
def merge_adapter(base: Path, adapter: Path, out: Path, overwrite: bool, dtype: str | None) -> None:
    """Merge a LoRA ADAPTER into BASE, the model that it was trained on, and write the whole model.

    For one command, BASE+ADAPTER does the same wherever a command takes a model.
    """
    import torch

    from koine.combine.adapters import merge_adapter as merge

    with recorded_output(out, {"base": base, "adapter": adapter}):
        merge(base, adapter, out, dtype=None if dtype is None else getattr(torch, dtype), overwrite=overwrite)
    print_answer({"written": out}, lambda: note(f"written to {out}"))
