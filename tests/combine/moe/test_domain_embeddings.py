"""Domain embeddings are similar for similar texts, survive saving, and have unit variance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from koine.combine.moe.domain_embeddings import (
    BUCKETS,
    HiddenStateEncoder,
    RandomProjectionEncoder,
    TfidfEncoder,
    domain_embedding,
    fit_encoder,
    load_encoder,
)
from koine.errors import UserError
from koine.model.formats.mixture_files import DOMAIN_ENCODER
from tests.combine.models import write_branches

CODE = [f"def function_{n}(value): return value * {n}" for n in range(20)]
MORE_CODE = [f"class Thing{n}: def method(self): return {n}" for n in range(20)]
LAW = [f"The court held that section {n} of the act applies to the defendant" for n in range(20)]


def test_similar_domains_have_similar_embeddings() -> None:
    encoder = TfidfEncoder.fit(CODE + LAW, 8)
    code, more, law = (domain_embedding(encoder, texts) for texts in (CODE, MORE_CODE, LAW))
    assert torch.cosine_similarity(code, more, dim=0) > torch.cosine_similarity(code, law, dim=0) + 0.2
    assert float(code.square().mean()) == pytest.approx(1.0, rel=1e-4)


def test_svd_projects_on_singular_vectors() -> None:
    """`encode` projects documents on the right singular vectors of the matrix of documents."""
    encoder = TfidfEncoder.fit(CODE + LAW, 4)
    identity = encoder.components.T @ encoder.components
    assert torch.allclose(identity, torch.eye(4), atol=1e-4)
    encoded = encoder.encode(CODE + LAW)
    products = encoded.T @ encoded
    assert torch.allclose(products, torch.diag(products.diagonal()), atol=1e-2 * float(products.max()))


@pytest.mark.parametrize("kind", ["tfidf", "svd", "hidden"])
def test_a_saved_encoder_gives_the_same_embeddings(tmp_path: Path, kind: str) -> None:
    seed, _ = write_branches(tmp_path, ())
    encoder = fit_encoder(kind, {"code": CODE, "law": LAW}, seed_model=seed, width=8)
    folder = tmp_path / "mixture" / DOMAIN_ENCODER
    folder.mkdir(parents=True)
    encoder.save(folder)
    assert torch.equal(load_encoder(tmp_path / "mixture").encode(MORE_CODE), encoder.encode(MORE_CODE))


def test_domains_without_an_embedding_are_refused() -> None:
    with pytest.raises(UserError, match="20 documents for domain embeddings of 64 dimensions"):
        TfidfEncoder.fit(CODE, 64)
    encoder = TfidfEncoder.fit(CODE + LAW, 4)
    for texts in ([], ["", " "]):
        with pytest.raises(UserError, match="no documents|no embedding"):
            domain_embedding(encoder, texts)


def test_a_sentence_transformers_folder(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    transformer = Transformer(str(tmp_path / "bert"))
    library.SentenceTransformer(modules=[transformer, Pooling(32)]).save(str(tmp_path / "encoder"))
    seed, _ = write_branches(tmp_path, ())
    encoder = fit_encoder(str(tmp_path / "encoder"), {}, seed_model=seed, width=0)
    assert encoder.encode(CODE).shape == (20, 32)
    folder = tmp_path / "mixture" / DOMAIN_ENCODER
    folder.mkdir(parents=True)
    encoder.save(folder)
    assert torch.equal(load_encoder(tmp_path / "mixture").encode(LAW), encoder.encode(LAW))
    with pytest.raises(UserError, match="no such folder"):
        fit_encoder(str(tmp_path / "nothing"), {}, seed_model=seed, width=0)


WORDS = {
    "law": "court held section act defendant judgment appeal statute plaintiff contract evidence liable",
    "cooking": "onion butter simmer whisk oven flour garlic tablespoon roast minutes salt dough",
    "sailing": "mast harbour rudder tide anchor stern sailors knots wind jib hull deck",
}
OTHER = {
    "ελληνικά": "το ποτάμι κατεβαίνει προς τη θάλασσα και ο άνεμος φυσάει δυνατά πάνω από τα παλιά πέτρινα σπίτια",
    "code": "def get_value(self, key): if key in self._table: return self._table[key] raise KeyError(key) import os",
}


def documents(words: str, count: int = 60) -> list[str]:
    """Return texts of a domain: its words in random order, mixed with common English words."""
    import random

    draw, common = random.Random(words), ["the", "and", "of", "was", "that", "with"]
    english = words.isascii() and "def " not in words
    pool = words.split() + (common if english else [])
    return [" ".join(draw.choices(pool, k=40)) for _ in range(count)]


@pytest.mark.parametrize("width", [32, 64])
def test_a_new_domain_is_far_from_the_known_ones(width: int) -> None:
    """Its cosines are small (chance gives `1 / sqrt(width)`), and most of it lies outside their span."""
    known = {name: documents(words) for name, words in WORDS.items()}

    encoder = fit_encoder("tfidf", known, seed_model=Path(), width=width)
    old = torch.stack([domain_embedding(encoder, texts) for texts in known.values()])
    old = torch.nn.functional.normalize(old, dim=-1)
    fresh = {name: domain_embedding(encoder, documents(words)) for name, words in OTHER.items()}
    axes = torch.linalg.qr(old.T)[0]
    assert float((old @ old.T - torch.eye(3)).abs().max()) < 0.6
    for name, vector in fresh.items():
        unit = torch.nn.functional.normalize(vector, dim=0)
        assert float((old @ unit).abs().max()) < 3 / width**0.5, name
        assert 1 - float((axes.T @ unit).square().sum()) > 0.7, name


def test_a_random_projection_keeps_angles() -> None:
    """The cosine of two documents is that of their n-grams less the centre, up to `1 / sqrt(width)`."""
    encoder = RandomProjectionEncoder.fit(CODE + LAW, 40)
    wide = RandomProjectionEncoder(
        encoder.weights, torch.eye(BUCKETS), torch.zeros(BUCKETS)
    )  # every n-gram an axis of its own
    left, right = wide.encode([CODE[0]])[0], wide.encode([MORE_CODE[0]])[0]
    assert float(left.norm()) == pytest.approx(1.0, rel=1e-5)
    exact, found = float(left @ right), []
    for seed in range(40):
        drawn = torch.randn(BUCKETS, 40, generator=torch.Generator().manual_seed(seed)) / 40**0.5
        other = RandomProjectionEncoder(encoder.weights, drawn, encoder.centre)
        a, b = (other.encode([text])[0] + other.centre for text in (CODE[0], MORE_CODE[0]))
        found.append(float(a @ b))
    assert sum(found) / len(found) == pytest.approx(exact, abs=3 / (40 * 40) ** 0.5)
    assert torch.equal(encoder.encode([""]), torch.zeros(1, 40))


def test_encoders_of_earlier_versions_open(tmp_path: Path) -> None:
    """In a folder of version 0.1 `tfidf` is the SVD encoder, and `hidden` has no centre."""
    from safetensors.torch import save_file

    seed, _ = write_branches(tmp_path, ())
    folder = tmp_path / "mixture" / DOMAIN_ENCODER
    folder.mkdir(parents=True)
    old = TfidfEncoder.fit(CODE + LAW, 4)
    save_file({"idf": old.idf, "components": old.components}, folder / "tfidf.safetensors")
    (folder / "encoder.json").write_text('{"kind": "tfidf"}')
    assert torch.equal(load_encoder(tmp_path / "mixture").encode(CODE), old.encode(CODE))
    (folder / "encoder.json").write_text(f'{{"kind": "hidden", "model": "{seed}"}}')
    assert torch.equal(load_encoder(tmp_path / "mixture").encode(LAW), HiddenStateEncoder(seed).encode(LAW))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "unknown kind of encoder None"),
        ('{"kind": "word2vec"}', "unknown kind of encoder 'word2vec'"),
        ('{"kind": "hidden"}', "names no model"),
        ('{"kind": "tfidf"}', "is not the file of this encoder"),
        ('{"kind": "random-projection"}', "is not the file of this encoder"),
    ],
)
def test_damaged_encoder_files_are_refused(content: str, says: str, tmp_path: Path) -> None:
    folder = tmp_path / DOMAIN_ENCODER
    folder.mkdir()
    (folder / "encoder.json").write_text(content)
    (folder / "encoder.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=says):
        load_encoder(tmp_path)
