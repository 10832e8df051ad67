"""The steps of the shipped recipes: each a plain function over folders that can be called without any plan.

Heavy imports are inside the functions, so that a run in which everything is up to date never loads torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from koine.allocator import keep_freed_memory
from koine.errors import UserError
from koine.files import write_json
from koine.plan import step
from koine.recipes import estimates
from koine.recipes.corpus import Roles as CorpusRoles
from koine.recipes.corpus import existing, load_roles, read_lines, split_roles, write_own_corpus

if TYPE_CHECKING:
    from torch import nn

    from koine.data.mixture import Mixture, Packing, Source
    from koine.evaluate.scoring import ScoringModel
    from koine.model import Decoder
    from koine.tokenizer import Tokenizer
    from koine.tokenizer.weights import BucketMass, Scheme
    from koine.train import TrainSettings


@step(version="1", estimate=estimates.sample)
def sample_corpus(
    *,
    languages: tuple[str, ...],
    primary_cluster: str,
    primary_languages: tuple[str, ...],
    documents_per_language: int,
    questions_per_language: int,
    code_bytes: int,
    seed: int,
    out: Path,
) -> None:
    """Write the sample world in `languages`, and who is primary and who expanded."""
    from koine.data.sample import QUESTION_LANGUAGES, write_sample

    primary, expanded = split_roles(
        languages, primary_cluster=primary_cluster, primary_languages=primary_languages
    )
    world = out / "world"
    shutil.rmtree(world, ignore_errors=True)
    summary = write_sample(
        languages,
        world,
        seed=seed,
        documents_per_language=documents_per_language,
        questions_per_language=questions_per_language,
        code_bytes=code_bytes,
    )
    for path in world.iterdir():
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    world.rmdir()
    chat = tuple(code for code in languages if code in QUESTION_LANGUAGES)
    CorpusRoles(primary=primary, expanded=expanded, chat=chat).save(out)
    rows = [[str(value) for value in row] for row in summary.rows()]
    write_step_report(
        out,
        "Sample world",
        [
            {
                "kind": "text",
                "text": f"Facts and phrases from CLDR in {len(languages)} languages, the same facts in each. "
                f"Pretraining languages: {', '.join(primary)}. Languages that come in later: {', '.join(expanded)}.",
            },
            {"kind": "table", "columns": list(summary.columns), "rows": rows},
        ],
    )


@step(version="1", estimate=estimates.own)
def own_corpus(
    data: Path,
    *,
    fields: tuple[str, ...],
    primary_cluster: str,
    primary_languages: tuple[str, ...],
    languages: tuple[str, ...],
    max_bytes_per_language: int,
    heldout_bytes_per_language: int,
    heldout_share: float,
    min_bytes_per_language: int,
    max_bad_share: float,
    questions_per_language: int,
    seed: int,
    out: Path,
) -> None:
    """Sort the user's own records into a corpus; where they hold no chats, the sample world's questions stand in."""
    from koine.data import read_records
    from koine.data.sample import QUESTION_LANGUAGES, write_sample
    from koine.languages import language

    for folder in ("documents", "documents-heldout", "questions"):
        shutil.rmtree(out / folder, ignore_errors=True)
    # Every split: records that say they are of another than train become the held-out text.
    reader = read_records(data, fields=field_mapping(fields), max_bad_share=max_bad_share, split="all")
    wanted = {language(code).code for code in languages}
    unknown = 0

    def chosen() -> Iterator[dict[str, Any]]:
        nonlocal unknown
        for record in reader:
            if record["language"] == "und":
                unknown += 1
            elif not wanted or record["language"] in wanted:
                yield record

    shares = write_own_corpus(
        chosen(),
        out,
        max_bytes=max_bytes_per_language,
        heldout_bytes=heldout_bytes_per_language,
        heldout_share=heldout_share,
        min_bytes=min_bytes_per_language,
    )
    if not shares:
        raise UserError(
            f"no language has {min_bytes_per_language} bytes of text and a held-out document",
            where=data,
            mend=f"{unknown} records name no language: map the field (--set fields=text=...,language=...)"
            if unknown
            else "lower it with --set min_bytes_per_language=...",
        )
    primary, expanded = split_roles(
        tuple(shares), primary_cluster=primary_cluster, primary_languages=primary_languages
    )
    chat = tuple(code for code in shares if shares[code].chats)
    borrowed = tuple(code for code in shares if code in QUESTION_LANGUAGES) or ("en",)
    if not chat:
        chat = borrowed
        world = out / "world"
        shutil.rmtree(world, ignore_errors=True)
        write_sample(
            borrowed,
            world,
            seed=seed,
            documents_per_language=1,
            questions_per_language=questions_per_language,
            code_bytes=0,
        )
        shutil.rmtree(out / "questions")
        (world / "questions").replace(out / "questions")
        shutil.rmtree(world)
    CorpusRoles(primary=primary, expanded=expanded, chat=chat).save(out)
    name = {code: language(code).name for code in shares}
    write_step_report(
        out,
        "Your text",
        [
            {
                "kind": "text",
                "text": f"{len(shares)} languages; pretrained on: {', '.join(primary)}. Coming in later: {', '.join(expanded)}. "
                + (
                    "Chats are yours."
                    if not borrowed or chat != borrowed
                    else f"The text holds no chats, so the sample world's questions stand in for: {', '.join(chat)}."
                )
                + (f" {unknown} records name no language and were left out." if unknown else "")
                + (
                    f" {reader.bad} bad records were left out, the first: {reader.examples[0]}."
                    if reader.bad
                    else ""
                ),
            },
            {
                "kind": "table",
                "columns": [
                    "language",
                    "name",
                    "part",
                    "documents",
                    "bytes",
                    "held-out documents",
                    "held-out bytes",
                    "chats",
                ],
                "rows": [
                    [
                        code,
                        name[code],
                        "primary" if code in primary else "expanded",
                        share.documents,
                        share.bytes,
                        share.heldout_documents,
                        share.heldout_bytes,
                        share.chats,
                    ]
                    for code, share in shares.items()
                ],
            },
        ],
    )


def field_mapping(fields: tuple[str, ...]) -> dict[str, str]:
    """`("text=content", "language=lang")` as a mapping; raises `UserError` on an entry without `=`."""
    mapping = {}
    for entry in fields:
        name, separator, column = entry.partition("=")
        if not separator or not name or not column:
            raise UserError(
                f"field mapping '{entry}' is not NAME=COLUMN",
                mend="for example fields=text=content,language=lang",
            )
        mapping[name] = column
    return mapping


@step(version="1", estimate=estimates.tokenizer, threads=2)
def build_tokenizer(
    corpus: Path,
    *,
    scope: str,
    vocabulary_size: int,
    scheme: str,
    english_share: float,
    sample_bytes: int,
    seed: int,
    bucket_mass: str = "uniform",
    out: Path,
) -> None:
    """Train a byte-level BPE on the languages of `scope`: `universal` (all) or `cluster` (the primary ones)."""
    from koine.tokenizer import train_tokenizer

    roles = load_roles(corpus)
    codes = roles.all if scope == "universal" else roles.primary
    texts = {code: partial(_texts, path) for code, path in existing(corpus, "documents", codes).items()}
    tokenizer = train_tokenizer(
        texts,
        vocab_size=vocabulary_size,
        scheme=cast("Scheme", scheme),
        bucket_mass=cast("BucketMass", bucket_mass),
        english_share=english_share if "en" in texts and len(texts) > 1 else None,
        sample_bytes=sample_bytes,
        seed=seed,
    )
    tokenizer.save(out)
    rows: list[list[str | float]] = []
    for code, path in existing(corpus, "documents-heldout", roles.all).items():
        size, count = 0, 0
        for record in read_lines(path):
            size += len(record["text"].encode("utf-8"))
            count += len(tokenizer.encode(record["text"]))
        rows.append([code, "yes" if code in texts else "no", round(size / count, 3)])
    write_json(out / "bytes_per_token.json", {str(row[0]): row[2] for row in rows})
    write_step_report(
        out,
        f"Tokenizer: {scope}",
        [
            {
                "kind": "text",
                "text": f"{tokenizer.vocab_size} tokens from {len(texts)} languages. More bytes in a token means shorter sequences.",
            },
            {
                "kind": "bars",
                "categories": [str(row[0]) for row in rows],
                "series": [{"name": "bytes per token, held-out text", "values": [row[2] for row in rows]}],
                "x_label": "language",
                "y_label": "bytes per token",
            },
        ],
    )


def _texts(path: Path) -> Iterator[str]:
    for record in read_lines(path):
        yield record["text"]


@step(version="1", estimate=estimates.tokens)
def tokenize_part(corpus: Path, tokenizer: Path, *, part: str, domain: str, out: Path) -> None:
    """Tokenize one part of a corpus (`documents`, `questions/train`, `code.jsonl`) into token shards."""
    from koine.data import tokenize

    shutil.rmtree(out / "tokens", ignore_errors=True)
    tokenize(corpus / part, tokenizer, out=out / "tokens", workers=1, domain=domain, max_bad_share=0.0)


@step(version="1", estimate=estimates.training)
def pretrain(
    corpus: Path,
    tokenizer: Path,
    documents: Path,
    code: Path | None = None,
    *,
    preset: str,
    vocabulary_size: int,
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    dtype: str,
    code_share: float,
    english_share: float,
    evaluate_every: int,
    seed: int,
    threads: int,
    expanded_share: float = 0.0,
    track_languages: bool = False,
    out: Path,
) -> None:
    """Pretrain a new model of `preset` on the primary languages (and code), from random weights.

    `expanded_share` of the text is of the expanded languages, in equal parts, and comes out of English's share, as in the
    5 % arm of arXiv 2506.10766. With `track_languages`, each evaluation also writes every language's bits per byte to `languages.jsonl`.
    """
    import torch

    from koine.data import Source
    from koine.model import Decoder
    from koine.model import preset as model_preset
    from koine.tokenizer import load_tokenizer

    roles = load_roles(corpus)
    torch.manual_seed(seed)
    found = load_tokenizer(tokenizer).vocab_size
    if found != vocabulary_size:
        raise UserError(
            f"the text gave {found} of the {vocabulary_size} tokens asked for",
            where=tokenizer,
            mend=f"set vocabulary_size={found} or add text",
        )
    model = Decoder(model_preset(preset, vocab_size=vocabulary_size))
    if not 0.0 <= expanded_share < english_share:
        raise UserError(
            f"the share of expanded languages is {expanded_share}, that of English {english_share}",
            mend="the first comes out of the second, so it must be smaller",
        )
    primary_english = (english_share - expanded_share) / (1.0 - expanded_share)
    text_share = 1.0 - (code_share if code is not None else 0.0)
    sources = [
        Source(
            name="documents",
            path=documents / "tokens",
            proportion=text_share * (1.0 - expanded_share),
            languages=with_english_share(roles.primary, primary_english),
        )
    ]
    if expanded_share > 0.0:
        sources.append(
            Source(
                name="expanded",
                path=documents / "tokens",
                proportion=text_share * expanded_share,
                languages=dict.fromkeys(roles.expanded, 1.0),
            )
        )
    if code is not None:
        sources.append(Source(name="code", path=code / "tokens", proportion=code_share))
    train_step(
        model,
        phase_of("pretrain", sources, steps, sequence_length, batch_size, seed, packing="stream"),
        training_settings(
            learning_rate=learning_rate,
            schedule="cosine",
            steps=steps,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            evaluate_every=evaluate_every,
            seed=seed,
            threads=threads,
        ),
        out=out,
        tokenizer=tokenizer,
        evaluate=bits_per_byte_probe(
            corpus,
            tokenizer,
            {"primary": roles.primary},
            most_bytes=3_000 if track_languages else None,
            tracked=out / "languages.jsonl" if track_languages else None,
        ),
    )


@step(version="1", estimate=estimates.training)
def adapt(
    corpus: Path,
    tokenizer: Path,
    model: Path,
    documents: Path,
    *,
    preset: str,
    vocabulary_size: int,
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    dtype: str,
    primary_share: float,
    evaluate_every: int,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """Continue pretraining on the expanded languages, with a share of the primary ones re-injected."""
    from koine.data import Source

    roles = load_roles(corpus)
    sources = [
        Source(
            name="expanded",
            path=documents / "tokens",
            proportion=1.0 - primary_share,
            languages=dict.fromkeys(roles.expanded, 1.0),
        ),
        Source(
            name="primary",
            path=documents / "tokens",
            proportion=primary_share,
            languages=dict.fromkeys(roles.primary, 1.0),
        ),
    ]
    train_step(
        load_of_preset(model, preset, vocabulary_size),
        phase_of("continue", sources, steps, sequence_length, batch_size, seed, packing="stream"),
        training_settings(
            learning_rate=learning_rate,
            schedule="constant",
            steps=steps,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            evaluate_every=evaluate_every,
            seed=seed,
            threads=threads,
        ),
        out=out,
        tokenizer=tokenizer,
        evaluate=bits_per_byte_probe(
            corpus, tokenizer, {"primary": roles.primary, "expanded": roles.expanded}
        ),
    )


@step(version="1", estimate=estimates.training)
def teach_chat(
    tokenizer: Path,
    model: Path,
    chats: Path,
    *,
    preset: str,
    vocabulary_size: int,
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    dtype: str,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """Supervised fine-tuning on chats: whole conversations packed, loss on the completions only."""
    from koine.data import Source

    train_step(
        load_of_preset(model, preset, vocabulary_size),
        phase_of(
            "sft",
            [Source(name="chats", path=chats / "tokens", proportion=1.0)],
            steps,
            sequence_length,
            batch_size,
            seed,
            packing="whole",
        ),
        training_settings(
            learning_rate=learning_rate,
            schedule="linear",
            steps=steps,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            evaluate_every=0,
            seed=seed,
            threads=threads,
        ),
        out=out,
        tokenizer=tokenizer,
        evaluate=None,
    )


def load_of_preset(path: Path, preset: str, vocabulary_size: int) -> Decoder:
    """A model that must be of a preset's sizes ("": any); raises `UserError` where it is of others."""
    from koine.model import load_model
    from koine.model import preset as model_preset

    model = load_model(path)
    if preset and model.config != model_preset(preset, vocab_size=vocabulary_size):
        raise UserError(
            f"is not a {preset} with {vocabulary_size} tokens",
            where=path,
            mend="set preset and vocabulary_size",
        )
    return model


def with_english_share(codes: tuple[str, ...], share: float) -> dict[str, float]:
    """Weights over `codes`: English pinned to `share` where it is one of several, the others equal."""
    if "en" not in codes or len(codes) == 1:
        return dict.fromkeys(codes, 1.0)
    other = (1.0 - share) / (len(codes) - 1)
    return {code: share if code == "en" else other for code in codes}


@step(version="1", estimate=estimates.evaluation)
def evaluate_model(
    corpus: Path,
    model: Path,
    *,
    documents_per_language: int,
    questions_per_language: int,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """Bits per byte on held-out documents, and accuracy on the test questions where the corpus has some."""
    import torch

    from koine.evaluate import bits_per_byte, question_accuracy
    from koine.model import load_model
    from koine.tokenizer import load_tokenizer

    keep_freed_memory()
    torch.set_num_threads(threads)
    roles = load_roles(corpus)
    tokenizer = load_tokenizer(model)
    decoder = load_model(model, dtype=torch.float32)
    heldout = existing(corpus, "documents-heldout", roles.all)
    results = bits_per_byte(
        decoder, tokenizer, _first(heldout.values(), documents_per_language), batch_size=16, seed=seed
    )
    write_json(out / "samples.json", _samples(decoder, tokenizer, corpus, roles.chat))
    asked = existing(corpus, "questions/test", roles.chat)
    if asked and questions_per_language:
        results["questions"] = question_accuracy(
            decoder, tokenizer, _first(asked.values(), questions_per_language), batch_size=64, seed=seed
        )
    write_json(out / "evaluation.json", results)
    metrics = {"bits_per_byte": results["overall"]["bits_per_byte"]["value"]}
    write_json(out / "metrics.json", metrics)


def _samples(
    model: Decoder, tokenizer: Tokenizer, corpus: Path, codes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One question a language with the model's own answer, for the report."""
    from koine.model import Sampling, generate

    folder = "questions/test" if existing(corpus, "questions/test", codes) else "questions/train"
    records = list(_first(existing(corpus, folder, codes).values(), 1))
    asked = [
        record["messages"][:-1] if record["messages"][-1]["role"] == "assistant" else record["messages"]
        for record in records
    ]
    prompts = [tokenizer.encode_messages(messages, generation_prompt=True)[0] for messages in asked]
    if not prompts:
        return []
    stops = (tokenizer.end_of_turn_id, tokenizer.eos_id)
    answers = generate(model, prompts, Sampling(max_new_tokens=60), stop_ids=stops)
    return [
        {
            "title": record["language"]
            + (f", right answer: {record['answer']}" if record.get("answer") else ""),
            "messages": [*messages, {"role": "assistant", "content": tokenizer.decode(answer)}],
        }
        for record, messages, answer in zip(records, asked, answers, strict=True)
    ]


def _first(paths: Iterable[Path], limit: int) -> Iterator[dict[str, Any]]:
    """The first `limit` records of each file."""
    for path in paths:
        yield from islice(read_lines(path), limit)


def bits_per_byte_probe(
    corpus: Path,
    tokenizer: Path,
    groups: Mapping[str, tuple[str, ...]],
    *,
    documents: int = 3,
    most_bytes: int | None = None,
    tracked: Path | None = None,
) -> Callable[[nn.Module, int], Mapping[str, float]]:
    """An `evaluate` for the training loop: bits per byte of a few held-out documents of each group of languages.

    most_bytes: of each document, its beginning.
    tracked: a JSON Lines file that receives a line `{"step": ..., "bits_per_byte": {language: ...}}` each time: what is forgotten, and when.
    """
    from koine.evaluate import bits_per_byte
    from koine.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    codes = tuple(dict.fromkeys(code for members in groups.values() for code in members))
    records = [
        record if most_bytes is None else {**record, "text": beginning(record["text"], most_bytes)}
        for record in _first(existing(corpus, "documents-heldout", codes).values(), documents)
    ]

    def probe(model: nn.Module, step: int) -> Mapping[str, float]:
        scored = bits_per_byte(cast("ScoringModel", model), loaded, records, resamples=1)["languages"]
        found = {code: scored[code]["bits_per_byte"] for code in codes if code in scored}
        if tracked is not None:
            line = {"step": step, "bits_per_byte": {code: row["value"] for code, row in found.items()}}
            with tracked.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        result = {}
        for name, members in groups.items():
            rows = [found[code] for code in members if code in found]
            if rows:
                bits = sum(row["value"] * row["bytes"] for row in rows)
                result[f"bits_per_byte_{name}"] = bits / sum(row["bytes"] for row in rows)
        return result

    return probe


def beginning(text: str, most_bytes: int) -> str:
    """The first characters of a text that fit into `most_bytes` of UTF-8."""
    return text.encode("utf-8")[:most_bytes].decode("utf-8", errors="ignore")


def tracked_languages(path: Path) -> dict[int, dict[str, float]]:
    """Step -> language -> bits per byte of a `tracked` file; a step that was done again after a kill counts once."""
    return {line["step"]: line["bits_per_byte"] for line in read_lines(path)}


def phase_of(
    name: str,
    sources: list[Source],
    steps: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    *,
    packing: Packing,
) -> Mixture:
    from koine.data import Mixture, Phase

    return Mixture(
        phases=(Phase(name=name, steps=steps, sources=tuple(sources)),),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        packing=packing,
    )


def training_settings(*, steps: int, **fields: Any) -> TrainSettings:
    from koine.train import TrainSettings

    return TrainSettings(
        warmup_steps=max(1, steps // 20),
        checkpoint_every=max(10, steps // 10),
        keep_last=1,
        # A recipe's first steps are short and its phases change the data at once: a rise is no accident here.
        spike_deviations=0.0,
        **fields,
    )


def train_step(
    model: Decoder,
    mixture: Mixture,
    settings: TrainSettings,
    *,
    out: Path,
    tokenizer: Path,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None,
) -> None:
    import torch

    from koine.data import DataOrder
    from koine.train import language_modelling, supervised_fine_tuning, train

    chats = mixture.phases[0].name == "sft"
    train(
        model.to(torch.float32),
        supervised_fine_tuning if chats else language_modelling,
        DataOrder(mixture),
        settings,
        out=out,
        tokenizer=tokenizer,
        evaluate=evaluate,
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    metrics = {"loss": sum(losses[-10:]) / len(losses[-10:])}
    for line in reversed(lines):
        found = {
            key.removeprefix("evaluation/"): value
            for key, value in line.items()
            if key.startswith("evaluation/")
        }
        if found:
            metrics |= found
            break
    write_json(out / "metrics.json", metrics)


def write_step_report(out: Path, title: str, blocks: list[dict[str, Any]]) -> None:
    write_json(out / "report.json", {"title": title, "blocks": blocks})
