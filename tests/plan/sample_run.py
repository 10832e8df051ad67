"""A run folder such as `koine run quickstart` leaves, with figures made up by formula: `python -m tests.plan.sample_run DIR`."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

LANGUAGES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "pl": "Polish", "ru": "Russian", "el": "Greek",
    "fi": "Finnish", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "vi": "Vietnamese", "th": "Thai",
    "id": "Indonesian", "fil": "Filipino", "my": "Burmese", "ar": "Arabic", "fa": "Persian", "tr": "Turkish", "he": "Hebrew",
    "hi": "Hindi", "bn": "Bangla", "ta": "Tamil", "ur": "Urdu",
}  # fmt: skip
PRIMARY = 8
SAMPLES = [
    (
        "en, right answer: euro",
        "Which currency is used in Portugal?",
        "The currency of Portugal is the euro.",
    ),
    (
        "ar, right answer: الريال السعودي",
        "ما هي العملة المستخدمة في المملكة العربية السعودية؟",
        "العملة هي الريال السعودي (SAR).",
    ),
    ("hi, right answer: भारतीय रुपया", "भारत की मुद्रा क्या है?", "भारत की मुद्रा भारतीय रुपया है।"),
    ("zh, right answer: 人民币", "中国使用哪种货币？", "中国使用的货币是人民币。"),
    ("ja, right answer: 円", "日本の通貨は何ですか。", "日本の通貨は円です。"),
    ("he, right answer: שקל חדש", "מהו המטבע של ישראל?", "המטבע הוא שקל חדש."),
    ("th, right answer: บาท", "ประเทศไทยใช้สกุลเงินอะไร", ""),
]


def fingerprint(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def artifact(
    run: Path, name: str, step: str, parents: list[str], *, seconds: float, began: float, **more: Any
) -> Path:
    folder = run / name
    folder.mkdir(parents=True)
    record = {
        "artifact": name,
        "step": f"koine.steps.training:{step}",
        "version": "1",
        "parameters": {"seed": 0, **more.get("parameters", {})},
        "inputs": {
            f"input{index}": {"artifact": parent, "inside": "", "fingerprint": fingerprint(parent)}
            for index, parent in enumerate(parents)
        },
        "parents": [
            {"name": parent, "fingerprint": fingerprint(parent), "sha256": "0" * 64} for parent in parents
        ],
        "fingerprint": fingerprint(name),
        "code": {"koine": "0.1.0"},
        "environment": {
            "python": "3.11.9",
            "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
            "cores": 2,
            "threads": 1,
        },
        "argv": ["koine", "run", "quickstart"],
        "started": began,
        "finished": began + seconds,
        "seconds": seconds,
        "peak_memory_bytes": 1_100_000_000 + 1000 * int(began % 1000),
        "metrics": more.get("metrics", {}),
        "files": {path: fingerprint(name + path) for path in more.get("files", ["data.jsonl"])},
    }
    (folder / "artifact.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    if "blocks" in more:
        report = {"title": more.get("title", step), "blocks": more["blocks"]}
        (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    return folder


def curves(folder: Path, arm: str, steps: int, start: float, end: float, groups: list[str]) -> None:
    noise = random.Random(folder.name + arm)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(steps):
            level = end + (start - end) * math.exp(-6 * step / steps)
            line = {
                "step": step, "loss": level + noise.gauss(0, 0.06), "learning_rate": 4e-3 * min(1, step / 15) * (1 + math.cos(math.pi * step / steps)) / 2,
                "gradient_norm": 0.6 + noise.random() * 0.3, "units": 4096.0, "tokens_per_second": 14_000 + noise.gauss(0, 300),
                "matmul_rate_share": 0.44 + noise.gauss(0, 0.01),
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            if (step + 1) % max(1, steps // 15) == 0:
                found = {
                    f"evaluation/bits_per_byte_{group}": level / 3 + 0.1 * index
                    for index, group in enumerate(groups)
                }
                file.write(json.dumps({"step": step, **found}) + "\n")


def write_sample_run(run: Path) -> Path:
    """Write the run into the new folder `run` and return it."""
    noise = random.Random(0)
    nodes: list[dict[str, Any]] = []
    codes = list(LANGUAGES)
    clock = 1_767_000_000.0

    def add(name: str, step: str, parents: list[str], seconds: float, **more: Any) -> Path:
        nonlocal clock
        folder = artifact(run, name, step, parents, seconds=seconds, began=clock, **more)
        clock += seconds
        nodes.append(
            {
                "name": name,
                "step": f"koine.steps.training:{step}",
                "status": "built",
                "parents": parents,
                "log": None,
            }
        )
        return folder

    rows = [
        [code, "primary" if i < PRIMARY else "expanded", str(600), f"{90_000 + 1000 * i:,}"]
        for i, code in enumerate(codes)
    ]
    add("corpus", "sample_corpus", [], 11.2, title="Sample world", parameters={"languages": codes, "documents_per_language": 600}, blocks=[
        {"kind": "text", "text": "Facts and phrases from CLDR in 24 languages, the same facts in each."},
        {"kind": "table", "columns": ["language", "part", "documents", "bytes"], "rows": rows},
    ], files=[f"documents/{code}.jsonl" for code in codes])  # fmt: skip
    for arm, bonus in (("universal", 0.5), ("cluster", 0.0)):
        share = [3.6 + noise.random() + (bonus if i >= PRIMARY else 0) for i in range(len(codes))]
        add(f"tokenizer/{arm}", "build_tokenizer", ["corpus"], 6.4, title=f"Tokenizer: {arm}", metrics={"vocabulary": 8192}, blocks=[
            {"kind": "text", "text": "8192 tokens. More bytes in a token means shorter sequences."},
            {"kind": "bars", "categories": codes, "series": [{"name": "bytes per token, held-out text", "values": share}],
             "x_label": "language", "y_label": "bytes per token"},
        ], files=["tokenizer.json"])  # fmt: skip
        for domain in ("documents", "chats", "code"):
            add(f"tokens/{arm}/{domain}", "tokenize_part", ["corpus", f"tokenizer/{arm}"], 4.1)
        documents = f"tokens/{arm}/documents"
        folder = add(f"pretrained/{arm}", "pretrain", ["corpus", f"tokenizer/{arm}", documents, f"tokens/{arm}/code"], 81.5,
                     parameters={"steps": 300, "learning_rate": 0.004, "preset": "koine-2m"},
                     metrics={"loss": 2.412 + bonus / 5, "bits_per_byte_primary": 0.912}, files=["config.json", "model.safetensors"])  # fmt: skip
        curves(folder, arm, 300, 9.0, 2.4 + bonus / 5, ["primary"])
        folder = add(f"adapted/{arm}", "adapt", ["corpus", f"tokenizer/{arm}", f"pretrained/{arm}", documents], 44.0,
                     metrics={"loss": 2.9 - bonus}, files=["config.json", "model.safetensors"])  # fmt: skip
        curves(folder, arm, 150, 5.4 - bonus, 2.9 - bonus, ["primary", "expanded"])
        final = "model" if arm == "universal" else f"model-{arm}"
        folder = add(
            final,
            "teach_chat",
            [f"tokenizer/{arm}", f"adapted/{arm}", f"tokens/{arm}/chats"],
            38.7,
            metrics={"loss": 0.71},
        )
        curves(folder, arm, 150, 2.2, 0.7, [])
        for stage, model in (
            ("pretrained", f"pretrained/{arm}"),
            ("adapted", f"adapted/{arm}"),
            ("chat", final),
        ):
            add(
                f"evaluation/{arm}/{stage}",
                "evaluate_model",
                ["corpus", model],
                14.9,
                metrics={"bits_per_byte": 1.271},
            )

    def bits(arm: int) -> list[float]:
        return [0.9 + 0.02 * i + (0.25 * arm if i >= PRIMARY else -0.02 * arm) for i in range(len(codes))]

    def line(name: str, drop: float, width: float) -> dict[str, Any]:
        return {
            "name": name,
            "x": [width * i for i in range(1, 16)],
            "y": [2.6 * math.exp(-drop * i) + 1 for i in range(1, 16)],
        }

    first, second = bits(0), bits(1)
    table = [
        [code, LANGUAGES[code], "primary" if i < PRIMARY else "expanded", round(first[i] + 1, 3), round(second[i] + 1, 3),
         round(first[i], 3), None if code == "my" else round(second[i], 3), round(4.1 + 0.01 * i, 3), round(3.1, 3)]
        for i, code in enumerate(codes)
    ]  # fmt: skip
    arms = ["universal", "cluster"]
    blocks: list[dict[str, Any]] = [
        {"kind": "verdict", "title": "did the universal tokenizer adapt faster, and what did it cost?",
         "text": "Yes: it reached the cluster arm's final bits per byte on the expanded languages 2.31 times as fast counted in steps, and "
                 "1.87 times counted in bytes of text read. Its cost on the pretraining languages: +0.021 bits per byte after pretraining. "
                 "One seed and one small model: intervals are over documents, not over runs."},
        {"kind": "lines", "title": "Adaptation, by step", "x_label": "step of adaptation", "y_label": "bits per byte, expanded languages",
         "series": [line("universal", 0.22, 10), line("cluster", 0.13, 10)]},
        {"kind": "lines", "title": "Adaptation, by text read", "x_label": "text read, MB", "y_label": "bits per byte, expanded languages",
         "series": [line("universal", 0.22, 0.21), line("cluster", 0.13, 0.15)]},
        {"kind": "table", "title": "Bits per byte by language",
         "columns": ["code", "language", "part", *[f"{stage}, {arm}" for stage in ("pretrained", "adapted", "bytes/token") for arm in arms]],
         "rows": table, "caption": "Held-out documents, each scored alone from its BOS. Lower bits per byte is better."},
        {"kind": "bars", "title": "After adaptation", "categories": codes, "x_label": "language", "y_label": "bits per byte",
         "series": [{"name": arm, "values": [None if (arm, code) == ("cluster", "my") else value for code, value in zip(codes, values, strict=True)],
                     "intervals": [[value - 0.04, value + 0.05] for value in values]}
                    for arm, values in zip(arms, (first, second), strict=True)]},
        {"kind": "table", "title": "Questions answered exactly", "columns": ["code", "language", "recall, universal", "recall, cluster"],
         "rows": [["all", "all languages", "64% (61%–67%)", "58% (55%–61%)"], ["ar", "Arabic", "52% (40%–65%)", None]]},
        {"kind": "heatmap", "title": "Which language is answered in which", "label": "share of answers", "rows": codes[:10], "columns": codes[:10],
         "values": [[0.9 if i == j else None if (i, j) == (2, 3) else 0.1 / (1 + abs(i - j)) for j in range(10)] for i in range(10)]},
        {"kind": "samples", "title": "What the model answers", "samples": [
            {"title": title, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for title, question, answer in SAMPLES]},
    ]  # fmt: skip
    parents = [f"{kind}/{arm}" for kind in ("tokenizer", "pretrained", "adapted") for arm in arms]
    parents += [f"tokens/{arm}/documents" for arm in arms]
    parents += [f"evaluation/{arm}/{stage}" for arm in arms for stage in ("pretrained", "adapted", "chat")]
    add("comparison", "compare_arms", ["corpus", *parents], 0.3, title="Universal against cluster tokenizer", blocks=blocks,
        metrics={"adaptation_speed_per_step": 2.31, "adaptation_speed_per_byte": 1.87})  # fmt: skip
    (run / "plan.json").write_text(json.dumps({"run": run.name, "nodes": nodes}), encoding="utf-8")
    (run / "results.json").write_text("{}", encoding="utf-8")
    (run / "logs").mkdir()
    (run / ".work" / "half").mkdir(parents=True)
    (run / ".work" / "half" / "artifact.json").write_text("{", encoding="utf-8")
    return run


if __name__ == "__main__":
    print(write_sample_run(Path(sys.argv[1])))
