"""Bad inputs around text: reading it, the sample world, tokenizers, token shards, mixtures."""

from __future__ import annotations

from . import worlds
from .case import Case

SAMPLE = "data sample --languages de,en --out world"
TRAIN = "tokenizer train --data text.jsonl --vocab-size 300 --out new"
TOKENIZE = "data tokenize text.jsonl --tokenizer tokenizer --out new"

CASES = (
    Case(
        mistake="a language that does not exist",
        command="data sample --languages de,jp --out world",
        says="?",
    ),
    Case(mistake="no language at all", command="data sample --languages , --out world", says="?"),
    Case(
        mistake="a folder that is there already",
        command=SAMPLE,
        prepare=worlds.written("world/mine.txt", "keep me"),
        says="?",
    ),
    Case(
        mistake="a file where a folder must go",
        command="data sample --languages de --out taken/world",
        prepare=worlds.written("taken", "a file"),
        says="?",
    ),
    Case(
        mistake="a full disk",
        command=SAMPLE,
        during=worlds.full_disk,
        simulated="fsync reports that no space is left; a real full disk is tested beside it where mounting is allowed",
        says="?",
    ),
    Case(
        mistake="text that is not there",
        command="tokenizer train --data missing.jsonl --vocab-size 300 --out new",
        says="?",
    ),
    Case(mistake="an empty file", command=TRAIN, prepare=worlds.written("text.jsonl", ""), says="?"),
    Case(
        mistake="an empty folder",
        command="tokenizer train --data texts --vocab-size 300 --out new",
        prepare=lambda folder: (folder / "texts").mkdir(),
        says="?",
    ),
    Case(
        mistake="a kind of file that is not read",
        command="tokenizer train --data text.docx --vocab-size 300 --out new",
        prepare=worlds.written("text.docx", "x"),
        says="?",
    ),
    Case(
        mistake="a compressed file cut short",
        command="tokenizer train --data text.jsonl.gz --vocab-size 300 --out new",
        prepare=worlds.cut_gzip,
        says="?",
    ),
    Case(
        mistake="a Parquet file cut short",
        command="tokenizer train --data text.parquet --vocab-size 300 --out new",
        prepare=worlds.cut_parquet,
        says="?",
    ),
    Case(mistake="Latin-1 instead of UTF-8", command=TRAIN, prepare=worlds.latin_1_text, says="?"),
    Case(
        mistake="broken JSON on a line",
        command=TRAIN,
        prepare=worlds.text_with(*worlds.records(), '{"text": "no end'),
        says="?",
    ),
    Case(
        mistake="a record without text",
        command=TRAIN,
        prepare=worlds.text_with(*worlds.records(), {"language": "de", "title": "only this"}),
        says="?",
    ),
    Case(
        mistake="records without a language",
        command=TRAIN,
        prepare=worlds.text_with({"text": "so many words"}),
        says="?",
    ),
    Case(
        mistake="a language code in the data with a typo",
        command=TRAIN,
        prepare=worlds.text_with(*worlds.records(), {"text": "so many words", "language": "xq"}),
        says="?",
    ),
    Case(
        mistake="a file that may not be read",
        command=TRAIN,
        prepare=worlds.good_text,
        during=worlds.unreadable("text.jsonl"),
        simulated="opening it is refused, since the tests may run as root",
        says="?",
    ),
    Case(
        mistake="a vocabulary smaller than the alphabet",
        command="tokenizer train --data text.jsonl --vocab-size 100 --out new",
        prepare=worlds.good_text,
        says="?",
    ),
    Case(
        mistake="an impossible share of English",
        command=TRAIN + " --english-share 1.3",
        prepare=worlds.good_text,
        says="?",
    ),
    Case(
        mistake="a language that the data do not have",
        command=TRAIN + " --languages de,fr",
        prepare=worlds.good_text,
        says="?",
    ),
    Case(
        mistake="a folder without a tokenizer",
        command=TOKENIZE,
        prepare=worlds.both(worlds.good_text, lambda folder: (folder / "tokenizer").mkdir()),
        says="?",
    ),
    Case(
        mistake="a tokenizer cut short",
        command=TOKENIZE,
        prepare=worlds.having("text", "tokenizer", then=worlds.cut("tokenizer/tokenizer.json")),
        says="?",
    ),
    Case(
        mistake="a field mapping without an equals sign",
        command=TOKENIZE + " --fields body",
        prepare=worlds.having("text", "tokenizer"),
        says="?",
    ),
    Case(
        mistake="a field that the records do not have",
        command=TOKENIZE + " --fields text=body",
        prepare=worlds.having("text", "tokenizer"),
        says="?",
    ),
    Case(
        mistake="an impossible share of bad records",
        command=TOKENIZE + " --max-bad-share 2",
        prepare=worlds.having("text", "tokenizer"),
        says="?",
    ),
    Case(
        mistake="a message with an unknown role",
        command=TOKENIZE,
        prepare=worlds.having(
            "tokenizer",
            then=worlds.text_with({"messages": [{"role": "robot", "content": "hello"}], "language": "en"}),
        ),
        says="?",
    ),
    Case(
        mistake="a number of workers below one",
        command=TOKENIZE + " --workers 0",
        prepare=worlds.having("text", "tokenizer"),
        says="?",
    ),
)
