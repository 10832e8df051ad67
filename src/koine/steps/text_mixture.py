"""The mixture of a training step: sources by name, with languages that may be roles of the corpus.

A plan is made before its corpus exists. So a source names its tokens (a key of the step's input `tokens`),
and its languages may be `primary` or `expanded`: those that have this role in the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from koine.data.mixture import LongRows, Mixture, Packing, Phase, Source
from koine.errors import UserError
from koine.steps.corpus_files import Roles

ROLES = ("primary", "expanded")
MAX_DOMAIN_EPOCHS = 1_000.0
"""Passes over a domain's text without a warning: domains are small on purpose."""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """One source of a mixture; see `koine.data.Source` for the meaning of the fields."""

    name: str
    """Key of the training step's input `tokens`."""
    proportion: float = 1.0
    languages: tuple[str, ...] = ()
    """Codes, or roles of the corpus; drawn in equal parts. Empty: all languages, in their natural shares."""
    english_share: float | None = None
    """Share of English among `languages`, where it is one of several."""
    min_tokens: int | None = None
    max_epochs: float = 4.0

    def build(self, path: Path, roles: Roles | None) -> Source:
        """Return the source with its folder and language codes."""
        codes = language_codes(self.languages, roles)
        return Source(
            name=self.name,
            path=path,
            proportion=self.proportion,
            languages=language_weights(codes, self.english_share) if codes else None,
            min_tokens=self.min_tokens,
            max_epochs=self.max_epochs,
        )


@dataclass(frozen=True, kw_only=True)
class LongText:
    """Batches of long rows: every `every`-th step (1: all steps) has rows of `sequence_length` from `source`.

    A batch of long rows has as many tokens as the other batches.
    """

    every: int
    sequence_length: int
    source: TextSource


@dataclass(frozen=True, kw_only=True)
class TextMixture:
    """The data of one training step: sources in proportions, steps, and the shape of a batch.

    Raises `UserError` where it makes no valid `koine.data.Mixture`.
    """

    sources: tuple[TextSource, ...]
    steps: int
    sequence_length: int
    batch_size: int
    seed: int = 0
    packing: Packing = "concat"
    long: LongText | None = None

    def __post_init__(self) -> None:
        # Built once with placeholders, so that a mistake is found when the plan is made.
        self.build({}, Roles(primary=("en",), expanded=("de",), chat=()))

    @property
    def all_sources(self) -> tuple[TextSource, ...]:
        """The sources of all rows, long or not."""
        return self.sources if self.long is None else (*self.sources, self.long.source)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return self.sequence_length if self.long is None else self.long.sequence_length

    def build(self, tokens: Mapping[str, Path], roles: Roles | None) -> Mixture:
        """Return the mixture with the folder of each source's tokens, and with the corpus's languages."""

        def source(one: TextSource) -> Source:
            return one.build(tokens.get(one.name, Path(one.name)), roles)

        return Mixture(
            phases=(
                self._phase(
                    tuple(map(source, self.sources)), None if self.long is None else source(self.long.source)
                ),
            ),
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            seed=self.seed,
            packing=self.packing,
        )

    def _phase(self, sources: tuple[Source, ...], long_source: Source | None) -> Phase:
        if self.long is None or long_source is None:
            return Phase(name="training", steps=self.steps, sources=sources)
        length = self.long.sequence_length
        rows = max(1, self.batch_size * self.sequence_length // length)
        if self.long.every == 1:
            return Phase(
                name="training",
                steps=self.steps,
                sources=(long_source,),
                sequence_length=length,
                batch_size=rows,
            )
        long = LongRows(
            every=self.long.every, sequence_length=length, batch_size=rows, sources=(long_source,)
        )
        return Phase(name="training", steps=self.steps, sources=sources, long=long)


def language_codes(languages: Sequence[str], roles: Roles | None) -> tuple[str, ...]:
    """Return language codes, with each role replaced by the corpus's languages of that role."""
    codes: list[str] = []
    for one in languages:
        if one in ROLES:
            if roles is None:
                raise UserError(f"'{one}' is a role of languages, and no corpus is given")
            codes += getattr(roles, one)
        else:
            codes.append(one)
    return tuple(codes)


def language_weights(codes: tuple[str, ...], english_share: float | None) -> dict[str, float]:
    """Return equal weights, but for English its share where it is one of several."""
    if english_share is None or "en" not in codes or len(codes) == 1:
        return dict.fromkeys(codes, 1.0)
    other = (1.0 - english_share) / (len(codes) - 1)
    return {code: english_share if code == "en" else other for code in codes}


def pretraining_sources(
    *, english_share: float, expanded_share: float = 0.0, code_share: float = 0.0
) -> tuple[TextSource, ...]:
    """Return the sources `documents` (primary languages), `expanded` (expanded languages) and `code`.

    `expanded_share` of the text comes out of English's share, as in the 5 % arm of arXiv 2506.10766.
    A source without a share is left out.

    Raises `UserError` where the expanded languages would get all of English's share.
    """
    if not 0.0 <= expanded_share < english_share:
        raise UserError(
            f"the share of expanded languages is {expanded_share}, that of English {english_share}",
            hint="the first comes out of the second, so it must be smaller",
        )
    text_share = 1.0 - code_share
    sources = [
        TextSource(
            name="documents",
            proportion=text_share * (1.0 - expanded_share),
            languages=("primary",),
            english_share=(english_share - expanded_share) / (1.0 - expanded_share),
        )
    ]
    if expanded_share > 0.0:
        sources.append(
            TextSource(name="expanded", proportion=text_share * expanded_share, languages=("expanded",))
        )
    if code_share > 0.0:
        sources.append(TextSource(name="code", proportion=code_share))
    return tuple(sources)


def with_dialogues(
    sources: tuple[TextSource, ...], share: float, languages: tuple[str, ...] = ()
) -> tuple[TextSource, ...]:
    """Return the sources with a share of `dialogues` beside them; languages: of the dialogues, all by default.

    Raises `UserError` where nothing is left for the sources.
    """
    if not 0.0 <= share < 1.0:
        raise UserError(f"the share of dialogues is {share}", hint="give a share from 0 to less than 1")
    if share == 0.0:
        return sources
    dialogues = TextSource(
        name="dialogues", proportion=share, languages=languages, max_epochs=MAX_DOMAIN_EPOCHS
    )
    return (*(replace(one, proportion=(1.0 - share) * one.proportion) for one in sources), dialogues)


def chat_sources(*, dialogue_share: float, document_share: float) -> tuple[TextSource, ...]:
    """Return the sources `chats`, `dialogues` and `replayed` (documents): what is repeated is forgotten less.

    Raises `UserError` where nothing is left for the chats.
    """
    chats = 1.0 - dialogue_share - document_share
    if chats <= 0.0 or min(dialogue_share, document_share) < 0.0:
        raise UserError(
            f"dialogues have {dialogue_share} and documents {document_share} of the chat stage",
            hint="together they must have less than 1",
        )
    shares = {"chats": chats, "dialogues": dialogue_share, "replayed": document_share}
    return domain_sources(shares)


def adaptation_sources(languages: tuple[str, ...], primary_share: float) -> tuple[TextSource, ...]:
    """Return the sources `adapted` and `primary`: the languages to adapt to, and a share of the primary ones.

    languages: codes; none given: the corpus's expanded languages.
    """
    adapted = TextSource(name="adapted", proportion=1.0 - primary_share, languages=languages or ("expanded",))
    if primary_share <= 0.0:
        return (adapted,)
    return (adapted, TextSource(name="primary", proportion=primary_share, languages=("primary",)))


def domain_sources(shares: Mapping[str, float]) -> tuple[TextSource, ...]:
    """Return a source for each domain with a share above 0."""
    return tuple(
        TextSource(name=name, proportion=share, max_epochs=MAX_DOMAIN_EPOCHS)
        for name, share in shares.items()
        if share > 0.0
    )


def equal_shares(domains: Sequence[str], general: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return equal shares of `domains`, beside the given shares of others."""
    others = general or {}
    return {**dict.fromkeys(domains, (1.0 - sum(others.values())) / len(domains)), **others}
