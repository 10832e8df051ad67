"""Embeddings of domains: the mean of the embeddings of their documents, by an encoder that is named and kept with the mixture.

The encoder is independent of the router and fixed (arXiv 2408.15901, section 3). Three are offered: `tfidf` (hashed character n-grams, TF-IDF
and a truncated SVD; needs nothing but the texts), `hidden` (mean hidden states of the seed), and the folder of a sentence-transformers model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor

from koine.errors import UserError
from koine.extras import import_extra
from koine.files import read_json, write_json
from koine.model.mixture_files import DOMAIN_ENCODER

BUCKETS = 32_768
NGRAMS = (3, 4)
CHARACTERS = 4_000
"""Of each document, how many are looked at."""


class Encoder(Protocol):
    """Texts to vectors of one width."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`[texts, width]`, float32."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_encoder` needs."""
        ...


def domain_embedding(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """`[width]`: the mean of the documents' unit vectors, scaled so that its entries have unit variance (`DomainRouter` expects that)."""
    if not texts:
        raise UserError("a domain has no documents", mend="give text of each expert's domain")
    vectors = torch.nn.functional.normalize(encoder.encode(texts), dim=-1)
    mean = vectors.mean(dim=0)
    if not float(mean.norm()) > 0.0:
        raise UserError(
            "the documents of a domain have no embedding",
            mend="they hold no character that the encoder knows",
        )
    scaled: Tensor = mean * (mean.numel() ** 0.5 / mean.norm())
    return scaled


class TfidfEncoder:
    """TF-IDF of hashed character n-grams, projected on the leading right singular vectors of the documents it was fitted on.

    idf: `[BUCKETS]`; components: `[BUCKETS, width]`.
    """

    def __init__(self, idf: Tensor, components: Tensor) -> None:
        self.idf, self.components = idf, components

    @classmethod
    def fit(cls, texts: Sequence[str], width: int, *, seed: int = 0) -> TfidfEncoder:
        """Raises `UserError` for fewer documents than dimensions."""
        if len(texts) < width:
            raise UserError(
                f"{len(texts)} documents for domain embeddings of {width} dimensions",
                mend="give more documents, or a smaller --domain-size",
            )
        counts = _counts(texts)
        indices = counts.indices()
        frequency = torch.bincount(indices[1], minlength=BUCKETS).float()
        idf = torch.log((1.0 + len(texts)) / (1.0 + frequency)) + 1.0
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
        from safetensors.torch import save_file

        save_file({"idf": self.idf, "components": self.components}, folder / "tfidf.safetensors")
        write_json(folder / "encoder.json", {"kind": "tfidf"})


def _counts(texts: Sequence[str]) -> Tensor:
    """Sublinear counts of hashed n-grams, sparse `[texts, BUCKETS]`."""
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
    """The mean over positions of a language model's last hidden states."""

    def __init__(self, model: Path) -> None:
        self.path = model
        self._opened: tuple[Any, Any] | None = None

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `Encoder`; at most 512 tokens of each text are read."""
        from koine.model.checkpoint import load_model
        from koine.tokenizer import load_tokenizer

        if self._opened is None:
            self._opened = (load_model(self.path, dtype=torch.float32), load_tokenizer(self.path))
        model, tokenizer = self._opened
        means = []
        with torch.inference_mode():
            for text in texts:
                tokens = tokenizer.encode(text[:CHARACTERS])[:512] or [tokenizer.bos_id]
                means.append(model(torch.tensor([tokens]))[0].mean(dim=0))
        return torch.stack(means).clone()

    def save(self, folder: Path) -> None:
        """See `Encoder`: the model is named, not copied."""
        write_json(folder / "encoder.json", {"kind": "hidden", "model": str(self.path.resolve())})


def _refuse_custom_modules(folder: Path) -> None:
    """Raise `UserError` for a sentence encoder with modules of its own code, which some versions of the library run unasked."""
    if not (folder / "modules.json").is_file():
        return
    modules = read_json(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        kind = module.get("type") if isinstance(module, dict) else None
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise UserError(
                f"needs Python code that comes with it ({kind}), which is never run",
                where=folder,
                mend="give a sentence encoder of the library's own modules",
            )


class SentenceEncoder:
    """A sentence-transformers model in a local folder (extra `sentences`)."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                "no such folder", where=folder, mend="give a sentence-transformers model's folder"
            )
        library = import_extra(
            "sentence_transformers", extra="sentences", purpose="domain embeddings by a sentence encoder"
        )
        self.path = folder
        _refuse_custom_modules(folder)
        self._model = library.SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `Encoder`."""
        found = self._model.encode([text[:CHARACTERS] for text in texts], convert_to_tensor=True)
        assert isinstance(found, Tensor)
        return found.float().clone()

    def save(self, folder: Path) -> None:
        """See `Encoder`: the model is named, not copied."""
        write_json(folder / "encoder.json", {"kind": "sentences", "model": str(self.path.resolve())})


def fit_encoder(
    kind: str, texts: Mapping[str, Sequence[str]], *, seed_model: Path, width: int, random_seed: int = 0
) -> Encoder:
    """`tfidf` (of `width` dimensions, fitted on the domains' texts), `hidden` (of `seed_model`), or a sentence-transformers folder."""
    if kind == "tfidf":
        return TfidfEncoder.fit([text for part in texts.values() for text in part], width, seed=random_seed)
    if kind == "hidden":
        return HiddenStateEncoder(seed_model)
    return SentenceEncoder(Path(kind))


def load_encoder(model: Path) -> Encoder:
    """The encoder that a mixture's domain embeddings were made by."""
    folder = model / DOMAIN_ENCODER
    if not (folder / "encoder.json").exists():
        raise UserError(
            f"holds no {DOMAIN_ENCODER}",
            where=model,
            mend="it was not upcycled by nexus; only its router knows domains",
        )
    content = read_json(folder / "encoder.json")
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "tfidf":
        from safetensors.torch import load_file

        tensors = load_file(folder / "tfidf.safetensors")
        return TfidfEncoder(tensors["idf"], tensors["components"])
    if kind == "hidden":
        return HiddenStateEncoder(Path(content["model"]))
    if kind == "sentences":
        return SentenceEncoder(Path(content["model"]))
    raise UserError(f"unknown kind of encoder {kind!r}", where=folder / "encoder.json")
