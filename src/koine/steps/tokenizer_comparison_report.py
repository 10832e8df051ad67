"""The report of the comparison of tokenizers: verdict, terms, curves, tables and sample answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from koine.languages import language

Block = dict[str, Any]

ARMS = ("universal", "cluster")
IN_WORDS = {"pretrained": "pretraining", "adapted": "adaptation", "chat": "the chat stage"}
SOURCES = {
    "documents": "documents in the primary languages",
    "primary": "documents in the primary languages",
    "adapted": "documents in the expanded languages",
    "chats": "questions and answers",
    "replayed": "documents in all languages",
    "dialogues": "dialogues",
}
"""The sources of the stages in words; others, such as `code`, keep their names."""


def comparison_blocks(results: Mapping[str, Any], samples: Sequence[Any]) -> list[Block]:
    """Return the blocks of the report, from `results.json` and the universal arm's sample answers."""
    questions = question_table(results)
    return [
        {"kind": "verdict", "title": results["question"], "text": verdict(results)},
        {"kind": "text", "title": "What was trained", "text": trained_in_words(results)},
        {"kind": "terms", "title": "Terms", "terms": terms(results)},
        *curve_blocks(results),
        cost_table(results),
        forgetting_table(results),
        language_table(results),
        language_bars(results),
        *([questions] if questions else []),
        *sample_blocks(samples),
    ]


# Words


def verdict(results: Mapping[str, Any]) -> str:
    """Return the answer in words, one thought a line."""
    bits, cost = results["bits_per_byte"], results["cost_on_primary"]
    universal, cluster = (bits["adapted"][arm]["expanded"] for arm in ARMS)
    primary, expanded = (len(results["languages"][role]) for role in ("primary", "expanded"))
    lines = [
        speed_in_words(results["adaptation_speed"], primary=primary, expanded=expanded),
        f"After equal steps it needs {universal:.3f} bits per byte of unseen text there, the cluster arm "
        f"{cluster:.3f} (lower is better).",
        f"Its cost on the primary languages (the {primary} of pretraining): {signed(cost['pretrained'])} bits per "
        f"byte after pretraining ({bits['pretrained']['universal']['primary']:.3f} against "
        f"{bits['pretrained']['cluster']['primary']:.3f}), {signed(cost['adapted'])} after adaptation.",
        *answers_in_words(results["questions"].get("universal", {})),
        forgetting_in_words(results["forgetting_by_chat"]["universal"]),
        "One seed and one small model: intervals cover the choice of documents and questions, not that of the "
        "seed.",
    ]
    return "\n".join(lines)


def speed_in_words(speed: Mapping[str, Any], *, primary: int, expanded: int) -> str:
    """Return which arm adapted faster, and by how much; primary, expanded: numbers of languages."""
    arms = (
        f"the universal arm (tokenizer of all {primary + expanded} languages) reached the final level of the "
        f"cluster arm (tokenizer of the {primary} pretraining languages only) on the {expanded} expanded "
        "languages, those added after pretraining"
    )
    if speed["reached"] is None:
        return f"No: {speed['note']} on the {expanded} expanded languages, those added after pretraining."
    if speed["per_step"] is None:
        return f"Yes: {arms}, before adaptation began."
    faster = "Yes" if speed["per_step"] > 1.0 and speed["per_byte"] > 1.0 else "Not by every measure"
    least = "at least " if speed["at_least"] else ""
    note = f" ({speed['note']})" if speed["note"] else ""
    return (
        f"{faster}: {arms}, {least}{speed['per_step']:.1f} times as fast counted in steps, and "
        f"{least}{speed['per_byte']:.1f} times counted in bytes of text read{note}."
    )


def answers_in_words(by_kind: Mapping[str, Any]) -> list[str]:
    """Return the share of right answers of each kind beside its majority baseline; nothing without any."""
    parts = [
        f"{share(entry['value'])} of the {kind} questions ({MEANING[kind]}; 95 % interval "
        f"{percent_range(entry['interval'])}, majority baseline {share(entry['majority_baseline'])})"
        for kind, entry in by_kind.items()
    ]
    return [f"Its chat model answers {' and '.join(parts)} exactly right."] if parts else []


MEANING = {
    "recall": "facts that pretraining tells",
    "generalisation": "facts that no text states",
    "unmarked": "of unknown origin",
}


def forgetting_in_words(change: Mapping[str, Any]) -> str:
    """Return what the chat stage changed, by group of languages."""
    parts = [f"{signed(change[name]['change'])} on the {name} languages" for name in ("primary", "expanded")]
    return f"The chat stage changed its bits per byte by {' and '.join(parts)} (above 0: forgotten)."


def trained_in_words(results: Mapping[str, Any]) -> str:
    """Return model size, tokens trained on and data in one paragraph."""
    facts = results["models"]["universal"]
    text = facts["text"]
    languages = len(results["languages"]["primary"]) + len(results["languages"]["expanded"])
    stages = "; ".join(
        f"{IN_WORDS[stage]} {million(training['tokens'])} tokens in {training['steps']:,} steps "
        f"({', '.join(f'{share(part)} {SOURCES.get(name, name)}' for name, part in training['sources'].items())})"
        for stage, training in facts["training"].items()
    )
    return (
        f"Two models of {million(facts['parameters'])} parameters each ({facts['layers']} layers, hidden size "
        f"{facts['hidden_size']}, a vocabulary of {facts['vocabulary']:,} tokens) that differ in their tokenizer "
        f"alone. Each trained in three stages: {stages}. The data: {text['documents']:,} documents in "
        f"{languages} languages, {text['bytes'] / 1e6:.1f} MB of text, which are {million(text['tokens'])} "
        f"tokens of the universal tokenizer and {million(results['models']['cluster']['text']['tokens'])} of "
        "the cluster tokenizer. A batch has the same number of tokens in both arms, so the arm with longer "
        "tokens reads more text in a step."
    )


def terms(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the terms of this report with their meanings."""
    primary, expanded = (", ".join(results["languages"][role]) for role in ("primary", "expanded"))
    found = {
        "universal arm": "The model whose tokenizer was trained on the primary and the expanded languages.",
        "cluster arm": "The model whose tokenizer was trained on the primary languages only (a cluster of "
        "languages). Other scripts fall apart into bytes.",
        "primary languages": f"The languages of pretraining: {primary}.",
        "expanded languages": f"The languages added in adaptation, after pretraining: {expanded}.",
        "bits per byte": "Bits that the model needs on average to predict one byte of unseen text. It compares "
        "models with different tokenizers. Lower is better.",
        "chat stage": "Fine-tuning on questions and answers, the last stage.",
    }
    questions = results["evaluations"]["chat"]["universal"].get("questions")
    if questions:
        found |= {
            "recall": "Questions about facts that pretraining tells, and that no question of the chat stage asks for.",
            "generalisation": "Questions about facts that no training text states, such as new sums.",
            "majority baseline": "The share that one constant answer for each language and kind of question gets "
            f"right: the most frequent one among the {questions['majority_baseline']['answers_from']}.",
        }
    return [[term, meaning] for term, meaning in found.items()]


# Figures and tables


def curve_blocks(results: Mapping[str, Any]) -> list[Block]:
    """Return the learning curves of the adaptation, by step and by text read."""
    curves, label = results["curves"], "bits per byte, expanded languages"
    axes = (("Adaptation, by step", "steps", "steps of adaptation"),
            ("Adaptation, by text read", "megabytes", "text read, MB"))  # fmt: skip
    return [
        {
            "kind": "lines",
            "title": title,
            "series": [{"name": arm, "x": curves[arm][x], "y": curves[arm]["bits_per_byte"]} for arm in ARMS],
            "x_label": x_label,
            "y_label": label,
            "caption": "Mean over the expanded languages, on the documents of the tables below. The first point "
            "is the pretrained model. The ends are the tables' figures.",
        }
        for title, x, x_label in axes
    ]


def cost_table(results: Mapping[str, Any]) -> Block:
    """Return the table of what the universal tokenizer costs on the primary languages, by stage."""
    codes = results["languages"]["primary"]
    rows: list[list[Any]] = []
    for stage, words in IN_WORDS.items():
        universal, cluster = (results["bits_per_byte"][stage][arm]["primary"] for arm in ARMS)
        by_arm = [results["evaluations"][stage][arm]["languages"] for arm in ARMS]
        shared = [code for code in codes if all(code in found for found in by_arm)]
        higher = [
            code for code in shared if by_arm[0][code]["bits_per_byte"] > by_arm[1][code]["bits_per_byte"]
        ]
        rows.append(
            [
                words.removeprefix("the "),
                f"{universal:.3f}",
                f"{cluster:.3f}",
                signed(universal - cluster),
                f"{len(higher)} of {len(shared)}",
            ]
        )
    return {
        "kind": "table",
        "title": "Cost of the universal tokenizer on the primary languages",
        "columns": ["after", *ARMS, "cost", "worse in"],
        "rows": rows,
        "caption": "Bits per byte, mean over the primary languages. A cost above 0: the universal arm is worse there; "
        "in how many languages stands in the last column.",
    }


def forgetting_table(results: Mapping[str, Any]) -> Block:
    """Return the table of bits per byte before and after the chat stage, by arm and role."""
    rows = [
        [arm, name, *(f"{entry[key]:.3f}" for key in ("before", "after")), signed(entry["change"])]
        for arm in ARMS
        for name, entry in results["forgetting_by_chat"][arm].items()
    ]  # fmt: skip
    return {
        "kind": "table",
        "title": "Forgetting by the chat stage",
        "columns": ["arm", "languages", "before", "after", "change"],
        "rows": rows,
        "caption": "Bits per byte, mean over the languages. Above 0: the chat stage forgot.",
    }


def language_table(results: Mapping[str, Any]) -> Block:
    """Return the table of bits per byte and bytes per token, by language."""
    rows = []
    stages = ("pretrained", "adapted")
    for role in ("primary", "expanded"):
        for code in results["languages"][role]:
            row: list[Any] = [code, language(code).name, role]
            for stage in stages:
                for arm in ARMS:
                    found = results["evaluations"][stage][arm]["languages"].get(code)
                    row.append(None if found is None else round(found["bits_per_byte"], 3))
            rows.append([*row, *(results["bytes_per_token"][arm].get(code) for arm in ARMS)])
    return {
        "kind": "table",
        "title": "Bits per byte by language",
        "columns": [
            "code",
            "language",
            "role",
            *(f"{stage}, {arm}" for stage in stages for arm in ARMS),
            *(f"bytes/token, {arm}" for arm in ARMS),
        ],
        "rows": rows,
        "caption": "Held-out documents, each scored from its beginning. Fewer bits per byte are better. "
        "More bytes per token mean shorter sequences.",
    }


def language_bars(results: Mapping[str, Any]) -> Block:
    """Return the bars of the adapted models' bits per byte, by language."""
    codes = [code for role in ("primary", "expanded") for code in results["languages"][role]]
    by_arm = {arm: results["evaluations"]["adapted"][arm]["languages"] for arm in ARMS}
    return {
        "kind": "bars",
        "title": "After adaptation",
        "categories": codes,
        "series": [
            {
                "name": arm,
                "values": [by_arm[arm].get(code, {}).get("bits_per_byte") for code in codes],
                "intervals": [by_arm[arm].get(code, {}).get("interval") for code in codes],
            }
            for arm in ARMS
        ],
        "x_label": "language",
        "y_label": "bits per byte",
        "caption": "Thin lines: 95 % bootstrap intervals over documents.",
    }


def question_table(results: Mapping[str, Any]) -> Block | None:
    """Return the table of exact answers by language and kind, or nothing where no question was asked."""
    chat = {arm: results["evaluations"]["chat"][arm].get("questions") for arm in ARMS}
    if not all(chat.values()):
        return None
    kinds = list(chat["universal"]["overall"])
    rows = []
    asked = chat["universal"]["languages"]
    codes = [code for role in ("primary", "expanded") for code in results["languages"][role] if code in asked]
    for code in ["all", *codes, *(code for code in asked if code not in codes)]:
        row: list[Any] = [code, "all languages" if code == "all" else language(code).name]
        parts = [chat[arm]["overall"] if code == "all" else chat[arm]["languages"][code] for arm in ARMS]
        for kind in kinds:
            row += [answers_cell(part.get(kind)) for part in parts]
            row.append(share(parts[0][kind]["majority_baseline"]) if kind in parts[0] else None)
        rows.append(row)
    return {
        "kind": "table",
        "title": "Questions: exact answers",
        "columns": [
            "code",
            "language",
            *(f"{kind}, {what}" for kind in kinds for what in (*ARMS, "majority")),
        ],
        "rows": rows,
        "caption": "Recall: pretraining tells the fact, and no question of the chat stage asks for it. Generalisation: no "
        "text states it. Majority: the baseline of one constant answer for each language and kind of question. "
        "In brackets the 95 % Wilson score interval; questions about one fact count as a cluster.",
    }


def answers_cell(entry: Mapping[str, Any] | None) -> str | None:
    """Return `11 % (8–15)`: the share of right answers with its interval in per cent."""
    if entry is None:
        return None
    low, high = entry["interval"]
    return f"{share(entry['value'])} ({low * 100:.0f}–{high * 100:.0f})"


def sample_blocks(samples: Sequence[Any]) -> list[Block]:
    """Return the block of sample answers; nothing where there are none."""
    title = "Sample answers of the universal arm: the first test question of each language"
    return [{"kind": "samples", "title": title, "samples": list(samples)}] if samples else []


def share(value: float) -> str:
    """Return `11 %`, with a space that does not break."""
    return f"{value * 100:.0f}\u00a0%"


def percent_range(interval: Sequence[float]) -> str:
    """Return `4–27 %`."""
    return f"{interval[0] * 100:.0f}–{interval[1] * 100:.0f}\u00a0%"


def signed(value: float) -> str:
    """Return `+0.041` or `−0.041`, with a minus sign."""
    return f"{value:+.3f}".replace("-", "−")


def million(count: float) -> str:
    """Return `1.8 million`, or the number itself below 100,000."""
    return f"{count / 1e6:.1f} million" if count >= 100_000 else f"{count:,.0f}"
