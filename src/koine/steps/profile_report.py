"""The page of a profile: a verdict for each language in plain words, then charts, tables and conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from koine.evaluate.language_levels import (
    LEVELS,
    MOST_BITS,
    MOST_OF_BASELINE,
    MOST_UNKNOWN,
    NOT_AT_ALL,
    PARTLY,
    POORLY,
    UNKNOWN,
    WELL,
    remarks,
)
from koine.languages import language

Block = dict[str, Any]
Profiles = Mapping[str, Mapping[str, Any]]
"""`profile.json` of each model by name."""

MOST_NAMED = 6
"""If more languages than this have one level, and all do, they are counted and not named."""
IN_WORDS = {
    WELL: "Well",
    PARTLY: "Partly",
    POORLY: "Poorly",
    NOT_AT_ALL: "Not at all",
    UNKNOWN: "No verdict, because the text is not parallel",
}


def profile_blocks(profiles: Profiles, speeds: Mapping[str, Any]) -> list[Block]:
    """Return the blocks of the page, from `profile.json` of each model and `speed.json`."""
    return [
        verdict(profiles),
        *charts(profiles),
        *(language_table(profiles) if len(profiles) > 1 else []),
        *(model_table(name, one, alone=len(profiles) == 1) for name, one in profiles.items()),
        script_table(profiles),
        *speed_blocks(speeds),
        conditions_table(profiles, speeds),
        {"kind": "terms", "title": "What the words mean", "terms": terms()},
    ]


def model_blocks(profile: Mapping[str, Any]) -> list[Block]:
    """Return the blocks of one model's step."""
    return [model_table("", profile, alone=True), script_table({"": profile})]


# Words


def verdict(profiles: Profiles) -> Block:
    """Return which languages are served how, a line a level; for several models a paragraph each."""
    codes = languages_of(profiles)
    lines = []
    for name, profile in profiles.items():
        by_level = {
            level: [code for code in codes if profile["languages"][code]["level"] == level]
            for level in LEVELS
        }
        told = [
            f"{IN_WORDS[level]} ({len(members)}): {', '.join(map(name_of, members))}."
            if len(members) < max(len(codes), MOST_NAMED)
            else f"{IN_WORDS[level]}: all {len(members)} languages."
            for level, members in by_level.items()
            if members
        ]
        lines += [f"{name}. {told[0]}", *told[1:]] if len(profiles) > 1 else told
        lines += reservations(profile)
    if len(profiles) > 1:
        lines.insert(0, winners(profiles, codes))
    title = f"how well {'does' if len(profiles) == 1 else 'do'} {' and '.join(profiles)} serve "
    title += f"{len(codes)} languages?"
    return {"kind": "verdict", "title": title, "text": "\n".join(lines)}


def winners(profiles: Profiles, codes: Sequence[str]) -> str:
    """Return in how many languages each model clearly needs the fewest bits."""
    best = [
        fewest_bits({name: one["languages"][code] for name, one in profiles.items()})[0] for code in codes
    ]
    told = [f"{name} in {best.count(name)} of {len(codes)}" for name in profiles if name in best]
    unclear = f"no clear difference in {best.count(None)}" if None in best else ""
    return f"Fewest bits for the same text: {'; '.join([*told, *([unclear] if unclear else [])])}."


def reservations(profile: Mapping[str, Any]) -> list[str]:
    """Return what limits the verdict: a model that predicts even English badly."""
    english = profile["languages"].get("en")
    if english is None or english["baseline_share"] < 0.6:
        return []
    return [
        f"Even English takes {percent(english['baseline_share'])} of the bits that a code needs which knows no "
        "language: the model has learnt little, and the comparison with English says little."
    ]


def terms() -> list[list[str]]:
    """Return the terms of the page with their meanings."""
    return [
        [
            "well, partly, poorly",
            f"Bits for the same content as in English: at most {MOST_BITS[WELL]:g} times for well, at most "
            f"{MOST_BITS[PARTLY]:g} times for partly. And bits beside a code that knows no language: at most "
            f"{percent(MOST_OF_BASELINE[WELL])}, at most {percent(MOST_OF_BASELINE[PARTLY])}. All else is poorly. "
            "The bounds are a convention.",
        ],
        [
            "not at all",
            f"At least {percent(MOST_UNKNOWN)} of the text is unknown to the tokenizer, or the model needs no "
            "fewer bits than a code that knows no language.",
        ],
        [
            "a code that knows no language",
            "The better of two: one by the frequencies of the characters in this text, and one that takes all "
            "tokens of the vocabulary as equally likely.",
        ],
        [
            "bits per byte",
            "Bits that the model needs to predict a byte of text; less is better. Compare models in one language "
            "with it, not languages: their scripts need different numbers of bytes.",
        ],
        [
            "vs. no language",
            "Bits of the model over those of a code that knows no language; less is better.",
        ],
        [
            "bits, tokens vs. English",
            "Bits, or tokens, of a text over those of its English translation. 1.5 × means that the same content "
            "is 1.5 times as hard to predict, or as long.",
        ],
        [
            "bits per English byte",
            "Bits of a text over the bytes of its English translation: comparable between languages and models.",
        ],
        ["(1.2–1.4)", "95 % bootstrap interval over documents."],
        [
            "split letters",
            "Letters that the tokenizer has no token for and spells with parts of characters, each costing two or "
            "three tokens.",
        ],
        ["unknown text", "Share of the bytes that the tokenizer reads as unknown or drops."],
        [
            "adaptation cost",
            "Predicted rank of the cost of training the model on the language: 0 the cheapest of the languages "
            "here, 1 the dearest. It follows from tokens per byte and from the letters shared with the languages "
            "that the model knows; nothing was trained.",
        ],
        [
            "prefill, decode",
            "Tokens a second while a prompt is read, and while new tokens are generated, one request at a time.",
        ],
        ["KV cache", "Memory for the keys and values of one sequence of that length, besides the weights."],
    ]


def name_of(code: str) -> str:
    """Return a language's English name."""
    return "unknown language" if code == "und" else language(code).name


def script_name(script: str) -> str:
    """Return a script's English name."""
    from babel import Locale

    return str(Locale("en").scripts.get(script, script))


# Order


def languages_of(profiles: Profiles) -> list[str]:
    """Return the languages that all models have, best served first."""
    first, *others = (profile["languages"] for profile in profiles.values())

    def mean(code: str) -> tuple[float, float]:
        levels = [LEVELS.index(profile["languages"][code]["level"]) for profile in profiles.values()]
        values = [sort_value(profile["languages"][code]) for profile in profiles.values()]
        return sum(levels) / len(levels), sum(values) / len(values)

    return sorted((code for code in first if all(code in other for other in others)), key=mean)


def sort_value(row: Mapping[str, Any]) -> float:
    """Return the figure that languages of one level are sorted by."""
    found = row["relative_bits"] if row["relative_bits"] is not None else row["bits_per_byte"]
    return float(found)


# Charts


def charts(profiles: Profiles) -> list[Block]:
    """Return bars of bits and of tokens by language, best served first."""
    codes = languages_of(profiles)
    names = [name_of(code) for code in codes]
    parallel = all(
        profile["languages"][code]["bits_per_english_byte"] is not None
        for profile in profiles.values()
        for code in codes
    )
    bits = "bits_per_english_byte" if parallel else "bits_per_byte"
    interval = f"{bits}_interval" if parallel else "interval"
    title = "How hard is the same content to predict?" if parallel else "Bits per byte"
    label = "bits per English byte (less is better)" if parallel else "bits per byte"
    tokens = "relative_tokens" if parallel else "bytes_per_token"
    return [
        {
            "kind": "bars",
            "title": title,
            "categories": names,
            "x_label": "language",
            "y_label": label,
            "series": [
                {
                    "name": name,
                    "values": [profile["languages"][code][bits] for code in codes],
                    "intervals": [profile["languages"][code][interval] for code in codes],
                }
                for name, profile in profiles.items()
            ],
        },
        {
            "kind": "bars",
            "title": "How many tokens does the same content take?" if parallel else "Bytes per token",
            "categories": names,
            "x_label": "language",
            "y_label": "tokens, English: 1 (less is better)"
            if parallel
            else "bytes per token (more is better)",
            "series": [
                {"name": name, "values": [profile["languages"][code][tokens] for code in codes]}
                for name, profile in profiles.items()
            ],
        },
    ]


# Tables


def language_table(profiles: Profiles) -> list[Block]:
    """Return levels and bits per byte side by side, and which model has the fewest bits."""
    rows = []
    for code in languages_of(profiles):
        own = {name: profile["languages"][code] for name, profile in profiles.items()}
        rows.append(
            [
                name_of(code),
                *(row["level"] for row in own.values()),
                *(round(row["bits_per_byte"], 3) for row in own.values()),
                fewest_bits(own)[1],
            ]
        )
    columns = ["language", *profiles, *(f"bits per byte: {name}" for name in profiles), "fewest bits"]
    caption = (
        "Fewest bits: by how much of the next model's, with a 95 % bootstrap interval over the documents."
    )
    return [{"kind": "table", "title": "Side by side", "caption": caption, "columns": columns, "rows": rows}]


def fewest_bits(rows: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, str]:
    """Return which model clearly needs the fewest bits for the same documents, and by how much in words.

    rows: of one language, by model.
    """
    from koine.evaluate.bootstrap import bootstrap_interval

    best, second = sorted(rows, key=lambda name: float(sum(rows[name]["document_bits"])))[:2]
    ours, theirs = rows[best]["document_bits"], rows[second]["document_bits"]
    interval = bootstrap_interval(ours, theirs)
    if interval is None or interval[1] >= 1.0:
        return None, "no clear difference"
    low, high = (100 - 100 * end for end in (interval[1], interval[0]))
    return best, f"{best}, by {percent(1 - sum(ours) / sum(theirs))} ({low:.0f}–{high:.0f})"


def model_table(name: str, profile: Mapping[str, Any], *, alone: bool) -> Block:
    """Return the figures of one model by language, best served first; columns that say nothing are left out."""
    codes = languages_of({name: profile})
    rows = [profile["languages"][code] for code in codes]
    columns: dict[str, list[Any]] = {
        "language": [f"{name_of(code)} ({code})" for code in codes],
        "served": [row["level"] for row in rows],
        "bits vs. English": [
            with_interval(row["relative_bits"], row["relative_bits_interval"], 2) for row in rows
        ],
        "bits per byte": [with_interval(row["bits_per_byte"], row["interval"], 2) for row in rows],
        "vs. no language": [percent(row["baseline_share"]) for row in rows],
        "tokens vs. English": [rounded(row["relative_tokens"]) for row in rows],
        "bytes per token": [rounded(row["bytes_per_token"]) for row in rows],
        "split letters": [percent(row["split_share"]) for row in rows],
        "unknown text": [percent(row["unknown_share"]) for row in rows],
        "adaptation cost": [rounded(row["adaptation_cost"]) for row in rows],
        "letters seen": [percent(row["letters_seen"]) for row in rows],
        "remarks": [
            "; ".join([*remarks(row), *(["names and numbers only"] if row["form"] == "names" else [])])
            for row in rows
        ],
    }
    told = {
        column: cells
        for column, cells in columns.items()
        if any(cell not in (None, "") for cell in cells)
        and not (column == "unknown text" and set(cells) == {"0 %"})
    }
    return {
        "kind": "table",
        "title": "Language by language" if alone else name,
        "caption": model_in_words(profile),
        "columns": list(told),
        "rows": [list(row) for row in zip(*told.values(), strict=True)],
    }


def model_in_words(profile: Mapping[str, Any]) -> str:
    """Return the size of a model, and the languages from which the cost of adapting it is predicted."""
    about, known = profile["model"], profile["primary_languages"]
    context = about["context_length"]
    limit = "no limit of context" if context is None else f"{context:,} tokens of context"
    told = (
        f"{about['architecture']}, {about['parameters'] / 1e6:,.1f}M parameters, a vocabulary of "
        f"{about['vocabulary_size']:,}, {limit}."
    )
    if not known or len(known) == len(profile["languages"]):
        return told
    if len(known) > 6:
        return f"{told} Adaptation cost: from the {len(known)} languages without one."
    return f"{told} Adaptation cost: from {', '.join(map(name_of, known))}."


def rounded(value: float | None) -> float | None:
    """Return a figure with two decimals."""
    return None if value is None else round(value, 2)


def with_interval(value: float | None, interval: Sequence[float] | None, digits: int) -> str | None:
    """Return a figure with its interval: `1.53 (1.40–1.66)`."""
    if value is None:
        return None
    ends = "" if interval is None else f" ({interval[0]:.{digits}f}–{interval[1]:.{digits}f})"
    return f"{value:.{digits}f}{ends}"


def percent(share: float | None) -> str | None:
    """Return a share as percentage; small ones with decimals, so that they are not shown as none."""
    if share is None:
        return None
    digits = 0 if share == 0 or share >= 0.01 else 1 if share >= 0.001 else 2
    return f"{100 * share:.{digits}f} %"


def script_table(profiles: Profiles) -> Block:
    """Return what the tokenizers do to each script: bytes per token, split letters, unknown text."""
    first = next(iter(profiles.values()))["scripts"]
    scripts = sorted(
        (script for script in first if all(script in one["scripts"] for one in profiles.values())),
        key=lambda script: -first[script]["bytes_per_token"],
    )
    several = len(profiles) > 1
    columns, rows = ["script", "languages"], []
    for name in profiles:
        mark = f"{name}: " if several else ""
        columns += [
            f"{mark}bytes per token",
            f"{mark}split letters",
            f"{mark}into single bytes",
            f"{mark}unknown text",
        ]
    for script in scripts:
        row: list[Any] = [script_name(script), ", ".join(first[script]["languages"])]
        for profile in profiles.values():
            found = profile["scripts"][script]
            row += [
                round(found["bytes_per_token"], 2),
                percent(found["split_share"]),
                percent(found["single_byte_share"]),
                percent(found["unknown_share"]),
            ]
        rows.append(row)
    return {
        "kind": "table",
        "title": "Scripts: what the tokenizer splits",
        "caption": "Single bytes: each byte of the letter is a token of its own.",
        "columns": columns,
        "rows": rows,
    }


def speed_blocks(speeds: Mapping[str, Any]) -> list[Block]:
    """Return KV cache and speed by context length, with what was left out and why."""
    rows = []
    for name, lengths in speeds["models"].items():
        for one in lengths:
            rows.append(
                [
                    name,
                    f"{one['tokens']:,}",
                    None if one["cache_bytes"] is None else megabytes(one["cache_bytes"]),
                    spread(one["prefill_per_second"]),
                    spread(one["decode_per_second"]),
                    f"not measured: {one['left_out']}" if one["left_out"] else runs_in_words(one),
                ]
            )
    return [
        {
            "kind": "table",
            "title": "KV cache and speed by context length",
            "caption": "One request at a time: median (smallest–largest) of the runs.",
            "columns": [
                "model",
                "tokens of context",
                "KV cache, MB",
                "prefill, tokens/s",
                "decode, tokens/s",
                "how",
            ],
            "rows": rows,
        }
    ]


def runs_in_words(one: Mapping[str, Any]) -> str:
    """Return how many runs there were, and where the size of the cache comes from."""
    runs = f"{one['runs']} run{'s' if one['runs'] > 1 else ''}"
    return f"{runs}; cache {one['cache_basis']}" if one["cache_basis"] else runs


def megabytes(count: int) -> str:
    """Return bytes in millions."""
    return f"{count / 1e6:,.1f}"


def spread(found: Mapping[str, float] | None) -> str | None:
    """Return the median of several runs with their range."""
    if found is None:
        return None
    digits = 0 if found["median"] >= 100 else 1
    ends = (
        "" if found["low"] == found["high"] else f" ({found['low']:,.{digits}f}–{found['high']:,.{digits}f})"
    )
    return f"{found['median']:,.{digits}f}{ends}"


def conditions_table(profiles: Profiles, speeds: Mapping[str, Any]) -> Block:
    """Return what was measured on what: text, processor, precision, versions."""
    first = next(iter(profiles.values()))
    text, where = first["text"], speeds["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    rows = [
        ["text", text["about"]],
        [
            "how much",
            f"Tokenizer: {text['documents']:,} documents, {text['bytes']:,} bytes. "
            f"Model: {text['scored_documents']:,} documents, {text['scored_bytes']:,} bytes.",
        ],
        ["processor", f"{where['processor']}, {where['threads']} threads ({where['device']})"],
        ["precision", where["dtype"]],
        ["versions", versions],
    ]
    return {"kind": "terms", "title": "What was compared, and where", "terms": rows}
