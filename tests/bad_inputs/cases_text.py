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
        says="unknown language 'jp'; did you mean 'ja' (Japanese) or 'ajp' (South Levantine Arabic) or 'pt' (Portuguese)?",
    ),
    Case(
        mistake="a script with a typo",
        command="data sample --languages de,srp_Cryl --out world",
        says="unknown subtag 'cryl' of the language code 'srp_Cryl'; did you mean 'Cyrl'…",
    ),
    Case(
        mistake="no language at all",
        command="data sample --languages , --out world",
        says="no language is named; give codes separated by commas, for example de,hi,ja",
    ),
    Case(
        mistake="a folder that is there already",
        command=SAMPLE,
        prepare=worlds.written("world/mine.txt", "keep me"),
        says="world: exists already; choose another --out or remove it first",
    ),
    Case(
        mistake="a file where a folder must go",
        command="tokenizer train --data text.jsonl --vocab-size 294 --out taken/new",
        prepare=worlds.both(worlds.good_text, worlds.written("taken", "a file")),
        says="taken: a file stands where a folder must go; choose another place or remove the file",
    ),
    Case(
        mistake="a full disk",
        command=SAMPLE,
        during=worlds.full_disk,
        simulated="fsync reports that no space is left; a real full disk is tested beside it where mounting is allowed",
        says="world: the disk is full; free some space or choose another place; nothing half-written was kept",
    ),
    Case(
        mistake="text that is not there",
        command="tokenizer train --data missing.jsonl --vocab-size 300 --out new",
        says="missing.jsonl: no such file or folder",
    ),
    Case(
        mistake="an empty file",
        command=TRAIN,
        prepare=worlds.written("text.jsonl", ""),
        says="text.jsonl: holds no records; the files are empty",
    ),
    Case(
        mistake="an empty folder",
        command="tokenizer train --data texts --vocab-size 300 --out new",
        prepare=lambda folder: (folder / "texts").mkdir(),
        says="texts: holds no data files; known kinds: .txt, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .feather, .orc, also with .gz, .bz2, .xz, .zst",
    ),
    Case(
        mistake="a kind of file that is not read",
        command="tokenizer train --data text.docx --vocab-size 300 --out new",
        prepare=worlds.written("text.docx", "x"),
        says="text.docx: a file of unknown kind '.docx'; did you mean '.orc' or '.ndjson'?",
    ),
    Case(
        mistake="a compressed file cut short",
        command="tokenizer train --data text.jsonl.gz --vocab-size 300 --out new",
        prepare=worlds.cut_gzip,
        says="text.jsonl.gz: the compressed data is damaged or cut off (Compressed file ended before the end-of-stream marker was reached); copy or download it again",
    ),
    Case(
        mistake="a Parquet file cut short",
        command="tokenizer train --data text.parquet --vocab-size 300 --out new",
        prepare=worlds.cut_parquet,
        says="text.parquet: not a whole Parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.); it is truncated or damaged; copy or write it again",
    ),
    Case(
        mistake="a Parquet file of no bytes",
        command="tokenizer train --data text.parquet --vocab-size 300 --out new",
        prepare=worlds.written("text.parquet", ""),
        says="text.parquet: not a whole Parquet file (Parquet file size is 0 bytes); it is truncated or damaged; copy or write it again",
    ),
    Case(
        mistake="an Arrow stream of no bytes",
        command="tokenizer train --data text.arrow --vocab-size 300 --out new",
        prepare=worlds.written("text.arrow", ""),
        says="text.arrow: not a whole Arrow stream (…); it is truncated or damaged; copy or write it again",
    ),
    Case(
        mistake="a quote in CSV that is never closed",
        command="tokenizer train --data text.csv --vocab-size 300 --out new",
        prepare=worlds.written("text.csv", 'text,language\nGuten Tag,de\n"Hello,en\nGood day,en\n'),
        says="text.csv: a quote in line 3 is not closed as it should be (line 4: unexpected end of data); close it, and write a quote inside a quoted cell twice",
    ),
    Case(
        mistake="a Hugging Face data set whose list of files is damaged",
        command="tokenizer train --data texts --vocab-size 300 --out new",
        prepare=worlds.written("texts/state.json", "{}"),
        says="texts/state.json: lists no _data_files; it is damaged; copy the data set again, or save it again",
    ),
    Case(
        mistake="a Hugging Face data set that was not copied whole",
        command="tokenizer train --data texts --vocab-size 300 --out new",
        prepare=worlds.written("texts/state.json", '{"_data_files": [{"filename": "data-0.arrow"}]}'),
        says="texts/data-0.arrow: is missing; state.json lists it; copy the data set whole, or save it again",
    ),
    Case(
        mistake="Latin-1 instead of UTF-8",
        command=TRAIN,
        prepare=worlds.latin_1_text,
        says="20 of 40 records are bad (50.0%, at most 1.0% may be); the first is text.jsonl, line 1: not UTF-8 (invalid continuation byte at byte 38); fix the data, map its fields (--field text=COLUMN), or allow more (--max-bad)",
    ),
    Case(
        mistake="broken JSON on a line",
        command=TRAIN,
        prepare=worlds.text_with(*worlds.records(), '{"text": "no end'),
        says="1 of 41 records are bad (2.4%, at most 1.0% may be); the first is text.jsonl, line 41: not JSON (Invalid control character at at column 17); fix the data, map its fields (--field text=COLUMN), or allow more (--max-bad)",
    ),
    Case(
        mistake="a record without text",
        command=TRAIN,
        prepare=worlds.text_with(*worlds.records(), {"language": "de", "title": "only this"}),
        says="1 of 41 records are bad (2.4%, at most 1.0% may be); the first is text.jsonl, line 41: neither 'text' nor 'messages' (it has language, title); fix the data, map its fields (--field text=COLUMN), or allow more (--max-bad)",
    ),
    Case(
        mistake="a language code in the data with a typo",
        command=TRAIN,
        prepare=worlds.text_with(*worlds.records(), {"text": "so many words", "language": "xq"}),
        says="1 of 41 records are bad (2.4%, at most 1.0% may be); the first is text.jsonl, line 41: unknown language 'xq'; did you mean 'xh' (Xhosa) or 'sq' (Albanian) or 'qu' (Quechua)?; fix the data, map its fields (--field text=COLUMN), or allow more (--max-bad)",
    ),
    Case(
        mistake="a file that may not be read",
        command=TRAIN,
        prepare=worlds.good_text,
        during=worlds.unreadable("text.jsonl"),
        simulated="opening it is refused, since the tests may run as root",
        says="text.jsonl: cannot be read; check its permissions",
    ),
    Case(
        mistake="a vocabulary smaller than the alphabet",
        command="tokenizer train --data text.jsonl --vocab-size 100 --out new",
        prepare=worlds.good_text,
        says="--vocab-size: a vocabulary of 100 is smaller than the alphabet; take at least 294 (special tokens and 256 bytes)",
    ),
    Case(
        mistake="an impossible share of English",
        command=TRAIN + " --english-share 1.3",
        prepare=worlds.good_text,
        says="the share of English is 1.3; give a number between 0 and 1, or none for no fixed share",
    ),
    Case(
        mistake="a language that the data do not have",
        command=TRAIN + " --languages de,fr",
        prepare=worlds.good_text,
        says="text.jsonl: no text of language 'fr'; known: de, en",
    ),
    Case(
        mistake="a folder without a tokenizer",
        command=TOKENIZE,
        prepare=worlds.both(worlds.good_text, lambda folder: (folder / "tokenizer").mkdir()),
        says="tokenizer: holds no tokenizer.json; give a folder written by `koine tokenizer train` or a model's",
    ),
    Case(
        mistake="a tokenizer cut short",
        command=TOKENIZE,
        prepare=worlds.having("text", "tokenizer", then=worlds.cut("tokenizer/tokenizer.json")),
        says="tokenizer: not a tokenizer (EOF while parsing a string at line 350 column 14); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a field mapping without an equals sign",
        command=TOKENIZE + " --field body",
        prepare=worlds.having("text", "tokenizer"),
        says="--field 'body' is not NAME=COLUMN; for example --field text=content",
    ),
    Case(
        mistake="a field that the records do not have",
        command=TOKENIZE + " --field text=body",
        prepare=worlds.having("text", "tokenizer"),
        says="40 of 40 records are bad (100.0%, at most 1.0% may be); the first is text.jsonl, line 1: no field 'body' (it has id, text, language, domain); fix the data, map its fields (--field text=COLUMN), or allow more (--max-bad)",
    ),
    Case(
        mistake="an impossible share of bad records",
        command=TOKENIZE + " --max-bad 2",
        prepare=worlds.having("text", "tokenizer"),
        says="max_bad_share is 2.0; it must be at most 1",
    ),
    Case(
        mistake="a message with an unknown role",
        command=TOKENIZE,
        prepare=worlds.having(
            "tokenizer",
            then=worlds.text_with({"messages": [{"role": "robot", "content": "hello"}], "language": "en"}),
        ),
        says="1 of 1 records are bad (100.0%, at most 1.0% may be); the first is text.jsonl, line 1: message 1 has the role 'robot'; known: system, user, assistant; fix the data, map its fields (--field text=COLUMN), or allow more (--max-bad)",
    ),
    Case(
        mistake="a number of workers below one",
        command=TOKENIZE + " --workers 0",
        prepare=worlds.having("text", "tokenizer"),
        says="Invalid value for '--workers': 0 is not in the range x>=1.",
    ),
    Case(
        mistake="a language to measure that the data do not have",
        command="tokenizer measure tokenizer --data text.jsonl --languages de,sw --out m.json",
        prepare=worlds.having("text", "tokenizer"),
        says="text.jsonl: no text of language 'sw'; known: de, en",
    ),
    Case(
        mistake="a primary language without text",
        command="tokenizer predict tokenizer --data text.jsonl --primary en,pl",
        prepare=worlds.having("text", "tokenizer"),
        says="no text of the primary language 'pl'; known: de, en",
    ),
    Case(
        mistake="a vocabulary to extend that marks the inside of words",
        command="tokenizer extend tokenizer --data text.jsonl --tokens 5 --out new",
        prepare=worlds.having(
            "text",
            "tokenizer",
            then=worlds.marked_inside("tokenizer/tokenizer.json", "##"),
        ),
        says="tokenizer: marks the inside of words with '##'; extend a byte-level or byte-fallback BPE tokenizer",
    ),
    Case(
        mistake="a way to guess new rows that needs text, without any",
        command="tokenizer adapt model --tokenizer tokenizer --init focus --out new",
        prepare=worlds.having("model", "tokenizer"),
        says="the method 'focus' learns from text; give some with --text FILE",
    ),
)
