"""Domain embeddings: the mean embedding of a domain's documents.

The encoder is independent of the router, fixed, and saved with the mixture (arXiv 2408.15901, section 3).

- `tfidf`, the default: hashed character n-grams, weighted by rarity and projected at random, less the mean.
  A random projection keeps angles for any text, so a domain that is added later is not pressed into the span
  of the first ones. Rarity and mean are those of broad text (the sample world's languages) and the domains,
  so that what all text has in common does not make all domains alike.
- `hidden`: mean hidden states of the seed, less the mean likewise.
- `svd`: TF-IDF projected on the leading directions of the domains' own documents only.
- the folder of a sentence-transformers model, used as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor

from koine.errors import UserError, first_line
from koine.extras import import_extra
from koine.files import read_json, write_json
from koine.model.formats.mixture_files import DOMAIN_ENCODER
from koine.model.formats.safetensors_writer import save_tensors

BUCKETS = 32_768
NGRAMS = (3, 4)
BROAD = 6
"""Documents of broad text in each language of the sample world."""
CHARACTERS = 4_000
"""Characters read of each document."""


class Encoder(Protocol):
    """Maps texts to vectors of one width."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, `[texts, width]` float32."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `load_encoder` reads."""
        ...


def domain_embedding(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Return the mean of the documents' unit vectors, `[width]`.

    It is scaled so that its entries have unit variance, which `DomainRouter` expects. Raises `UserError` if
    there are no documents, or none has an embedding.
    """
    if not texts:
        raise UserError("a domain has no documents", hint="give text of each expert's domain")
    vectors = torch.nn.functional.normalize(encoder.encode(texts), dim=-1)
    mean = vectors.mean(dim=0)
    if not float(mean.norm()) > 0.0:
        raise UserError(
            "the documents of a domain have no embedding",
            hint="they hold no character that the encoder knows",
        )
    scaled: Tensor = mean * (mean.numel() ** 0.5 / mean.norm())
    return scaled


class RandomProjectionEncoder:
    """Hashed character n-grams weighted by rarity, projected at random, less the mean of broad text.

    Each document has length 1 before the projection.

    weights: `[BUCKETS]`, the squares of the idf, so that n-grams common in a language count little.
    components: `[BUCKETS, width]`, normal with variance `1 / width`, which keeps angles up to about
    `1 / sqrt(width)`. centre: `[width]`.
    """

    def __init__(self, weights: Tensor, components: Tensor, centre: Tensor) -> None:
        self.weights, self.components, self.centre = weights, components, centre

    @classmethod
    def fit(cls, texts: Sequence[str], width: int, *, seed: int = 0) -> RandomProjectionEncoder:
        """Fit rarity and centre to broad text and `texts`.

        Raises `UserError` if there are fewer documents than dimensions.
        """
        _check_enough(texts, width)
        counts = _counts([*_broad(), *texts])
        weights = _idf(counts).square()
        generator = torch.Generator().manual_seed(seed)
        components = torch.randn(BUCKETS, width, generator=generator) / width**0.5
        centre = _unit_rows_times(_weighted(counts, weights), components).mean(dim=0)
        return cls(weights, components, centre)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `Encoder`. A text without an n-gram gets zeros."""
        weighted = _weighted(_counts(texts), self.weights)
        found = torch.zeros(len(texts), dtype=torch.bool)
        found[weighted.indices()[0]] = True
        return (_unit_rows_times(weighted, self.components) - self.centre) * found[:, None]

    def save(self, folder: Path) -> None:
        """See `Encoder`."""
        tensors = {"weights": self.weights, "components": self.components, "centre": self.centre}
        save_tensors(tensors, folder / "encoder.safetensors")
        write_json(folder / "encoder.json", {"kind": "random-projection"})


def _broad(count: int = BROAD) -> list[str]:
    from koine.data.sample import broad_texts

    return broad_texts(count)


def _check_enough(texts: Sequence[str], width: int) -> None:
    if len(texts) < width:
        raise UserError(
            f"{len(texts)} documents for domain embeddings of {width} dimensions",
            hint="give more documents, or a smaller --domain-size",
        )


def _idf(counts: Tensor) -> Tensor:
    """Return the smoothed inverse document frequency plus 1, `[BUCKETS]`."""
    frequency = torch.bincount(counts.indices()[1], minlength=BUCKETS).float()
    return torch.log((1.0 + counts.shape[0]) / (1.0 + frequency)) + 1.0


def _unit_rows_times(rows: Tensor, components: Tensor) -> Tensor:
    """Multiply sparse `rows`, scaled to length 1, by `components`. A row of zeros stays one."""
    squares = torch.zeros(rows.shape[0]).index_add_(0, rows.indices()[0], rows.values().square())
    found: Tensor = torch.sparse.mm(rows, components) / squares.sqrt().clamp(min=1e-12)[:, None]
    return found


class TfidfEncoder:
    """TF-IDF of hashed character n-grams, projected on leading right singular vectors.

    They are those of the documents that it was fitted on, so of other text only the part in their span
    counts. Mixtures of earlier versions have this encoder.

    idf: `[BUCKETS]`; components: `[BUCKETS, width]`.
    """

    def __init__(self, idf: Tensor, components: Tensor) -> None:
        self.idf, self.components = idf, components

    @classmethod
    def fit(cls, texts: Sequence[str], width: int, *, seed: int = 0) -> TfidfEncoder:
        """Fit to `texts`. Raises `UserError` if there are fewer documents than dimensions."""
        _check_enough(texts, width)
        counts = _counts(texts)
        idf = _idf(counts)
        weighted = _weighted(counts, idf)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            _, _, right = torch.svd_lowrank(weighted, q=min(width + 8, min(weighted.shape)), niter=4)
        finally:
            torch.set_rng_state(state)
        return cls(idf, right[:, :width].contiguous())

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `Encoder`."""
        found: Tensor = torch.sparse.mm(_weighted(_counts(texts), self.idf), self.components)
        return found

    def save(self, folder: Path) -> None:
        """See `Encoder`."""
        save_tensors({"idf": self.idf, "components": self.components}, folder / "tfidf.safetensors")
        write_json(folder / "encoder.json", {"kind": "tfidf"})


def _counts(texts: Sequence[str]) -> Tensor:
    """Return `1 + log(count)` of hashed n-grams, sparse `[texts, BUCKETS]`."""
    rows, columns = [], []
    for row, text in enumerate(texts):
        flat = re.sub(r"\s+", " ", text[:CHARACTERS].casefold())
        for size in NGRAMS:
            found = [crc32(flat[at : at + size].encode()) % BUCKETS for at in range(len(flat) - size + 1)]
            rows += [row] * len(found)
            columns += found
    places = torch.tensor([rows, columns], dtype=torch.long)
    counts = torch.sparse_coo_tensor(
        places, torch.ones(len(rows)), (len(texts), BUCKETS), check_invariants=False
    ).coalesce()
    return torch.sparse_coo_tensor(
        counts.indices(), 1.0 + counts.values().log(), counts.shape, check_invariants=False, is_coalesced=True
    )


def _weighted(counts: Tensor, idf: Tensor) -> Tensor:
    values = counts.values() * idf[counts.indices()[1]]
    return torch.sparse_coo_tensor(
        counts.indices(), values, counts.shape, check_invariants=False, is_coalesced=True
    )


class HiddenStateEncoder:
    """Mean of a language model's last hidden states over positions, scaled to length 1, less a centre.

    centre: `[hidden]`. With None, as in mixtures of earlier versions, the means are returned as they are.
    """

    def __init__(self, model: Path, centre: Tensor | None = None) -> None:
        self.path, self.centre = model, centre
        self._opened: tuple[Any, Any] | None = None

    @classmethod
    def fit(cls, model: Path, texts: Sequence[str]) -> HiddenStateEncoder:
        """Fit the centre: the mean of one broad document in each language and of `texts`."""
        encoder = cls(model)
        means = encoder.encode([*_broad(1), *texts])
        encoder.centre = torch.nn.functional.normalize(means, dim=-1).mean(dim=0)
        return encoder

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `Encoder`. At most 512 tokens of each text are read."""
        from koine.model.formats.directory import load_model
        from koine.tokenizer import load_tokenizer

        if self._opened is None:
            self._opened = (load_model(self.path, dtype=torch.float32), load_tokenizer(self.path))
        model, tokenizer = self._opened
        means = []
        with torch.inference_mode():
            for text in texts:
                tokens = tokenizer.encode(text[:CHARACTERS])[:512] or [tokenizer.bos_id]
                means.append(model(torch.tensor([tokens]))[0].mean(dim=0))
        found = torch.stack(means).clone()
        return found if self.centre is None else torch.nn.functional.normalize(found, dim=-1) - self.centre

    def save(self, folder: Path) -> None:
        """See `Encoder`. The path of the model is written, not a copy."""
        if self.centre is not None:
            save_tensors({"centre": self.centre}, folder / "encoder.safetensors")
        write_json(folder / "encoder.json", {"kind": "hidden", "model": str(self.path.resolve())})


def _check_custom_modules(folder: Path) -> None:
    """Raise `UserError` if a sentence encoder brings its own code.

    Some versions of the library run such code unasked.
    """
    if not (folder / "modules.json").is_file():
        return
    modules = read_json(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        kind = module.get("type") if isinstance(module, dict) else None
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise UserError(
                f"needs Python code that comes with it ({kind}), which is never run",
                where=folder,
                hint="give a sentence encoder of the library's own modules",
            )


class SentenceEncoder:
    """A sentence-transformers model in a local folder (extra `sentences`)."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                "no such folder", where=folder, hint="give a sentence-transformers model's folder"
            )
        library = import_extra(
            "sentence_transformers", extra="sentences", purpose="domain embeddings by a sentence encoder"
        )
        self.path = folder
        _check_custom_modules(folder)
        self._model = library.SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `Encoder`."""
        found = self._model.encode([text[:CHARACTERS] for text in texts], convert_to_tensor=True)
        assert isinstance(found, Tensor)
        return found.float().clone()

    def save(self, folder: Path) -> None:
        """See `Encoder`. The path of the model is written, not a copy."""
        write_json(folder / "encoder.json", {"kind": "sentences", "model": str(self.path.resolve())})


def fit_encoder(
    kind: str, texts: Mapping[str, Sequence[str]], *, seed_model: Path, width: int, random_seed: int = 0
) -> Encoder:
    """Fit an encoder: `tfidf`, `svd`, `hidden`, or a sentence-transformers folder; see the module.

    width: dimensions of `tfidf` and `svd`. seed_model: the model whose hidden states `hidden` takes.
    """
    every = [text for part in texts.values() for text in part]
    if kind == "tfidf":
        return RandomProjectionEncoder.fit(every, width, seed=random_seed)
    if kind == "svd":
        return TfidfEncoder.fit(every, width, seed=random_seed)
    if kind == "hidden":
        return HiddenStateEncoder.fit(seed_model, every)
    return SentenceEncoder(Path(kind))


def load_encoder(model: Path) -> Encoder:
    """Load the encoder of a mixture's domain embeddings.

    Raises `UserError` if its files are not those of one.
    """
    folder = model / DOMAIN_ENCODER
    where = folder / "encoder.json"
    if not where.exists():
        raise UserError(
            f"holds no {DOMAIN_ENCODER}",
            where=model,
            hint="it was not upcycled by nexus; only its router knows domains",
        )
    content = read_json(where)
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "random-projection":
        return RandomProjectionEncoder(
            *_tensors(folder / "encoder.safetensors", "weights", "components", "centre")
        )
    if kind == "tfidf":
        return TfidfEncoder(*_tensors(folder / "tfidf.safetensors", "idf", "components"))
    if kind in ("hidden", "sentences"):
        named = content.get("model")
        if not isinstance(named, str):
            raise UserError("names no model", where=where, hint="upcycle again")
        if kind == "sentences":
            return SentenceEncoder(Path(named))
        path = folder / "encoder.safetensors"
        return HiddenStateEncoder(Path(named), _tensors(path, "centre")[0] if path.exists() else None)
    raise UserError(f"unknown kind of encoder {kind!r}", where=where)


def _tensors(path: Path, *names: str) -> list[Tensor]:
    """Return the tensors of an encoder's file. Raises `UserError` if it is damaged, or another's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        tensors = [found[name] for name in names]
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(
            f"is not the file of this encoder ({first_line(error)})",
            where=path,
            hint="copy the mixture's folder whole, or upcycle again",
        ) from None
    sizes = {"weights": BUCKETS, "idf": BUCKETS, "components": BUCKETS}
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.dtype != torch.float32 or sizes.get(name, len(tensor)) != len(tensor):
            raise UserError(f"{name} is not that of this encoder", where=path, hint="upcycle again")
    return tensors
