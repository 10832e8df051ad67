"""`koine tokenizer predict`: rank languages by the expected cost of adapting a model to them."""

from __future__ import annotations

from pathlib import Path

import click

from koine.cli.arguments import TOKENIZER
from koine.cli.tables import print_table
from koine.cli.tokenizer.texts import read_measured_texts


@click.command()
@click.argument("base", type=TOKENIZER)
@click.option("--data", multiple=True, required=True, type=click.Path(), help="Text of all these languages.")
@click.option("--primary", required=True, help="Comma-separated codes of the model's pretraining languages.")
@click.option("--max-bytes", default=200_000, show_default=True, help="Bytes of each language to look at.")
def predict(base: Path, data: tuple[str, ...], primary: str, max_bytes: int) -> None:
    """Rank languages by the expected cost of adapting a model with the tokenizer BASE to them.

    Nothing is trained: the ranking follows from tokens per byte and from the letters that a language shares
    with the primary languages.
    """
    from rich.table import Table

    from koine.languages import language
    from koine.tokenizer import open_tokenizer
    from koine.tokenizer.predict import predict_costs

    texts: dict[str, list[str]] = {}
    for one in read_measured_texts(
        data, None, parallel=False, split=None, max_bytes=max_bytes, max_bad_share=0.01
    ):
        texts.setdefault(one.language, []).append(one.text)
    codes = [language(code.strip()).code for code in primary.split(",") if code.strip()]
    table = Table(title="expected cost of adaptation, highest first")
    for name in ("language", "name", "tokens per byte", "letters seen", "cost"):
        table.add_column(name, justify="left" if name in ("language", "name") else "right")
    for expected in predict_costs(open_tokenizer(base), texts, primary=codes):
        name = language(expected.language).name if expected.language != "und" else "unknown"
        table.add_row(
            expected.language,
            name,
            f"{expected.tokens_per_byte:.3f}",
            f"{expected.script_overlap:.0%}",
            f"{expected.cost:.2f}",
        )
    print_table(table)
