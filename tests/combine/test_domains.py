"""Domain embeddings: alike where texts are alike, the same after saving, of unit variance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from koine.combine.domains import TfidfEncoder, domain_embedding, fit_encoder, load_encoder
from koine.errors import UserError
from koine.model.mixture_files import DOMAIN_ENCODER

from .models import write_branches

CODE = [f"def function_{n}(value): return value * {n}" for n in range(20)]
MORE_CODE = [f"class Thing{n}: def method(self): return {n}" for n in range(20)]
LAW = [f"The court held that section {n} of the act applies to the defendant" for n in range(20)]


def test_alike_domains_have_alike_embeddings() -> None:
    encoder = TfidfEncoder.fit(CODE + LAW, 8)
    code, more, law = (domain_embedding(encoder, texts) for texts in (CODE, MORE_CODE, LAW))
    assert torch.cosine_similarity(code, more, dim=0) > torch.cosine_similarity(code, law, dim=0) + 0.2
    assert float(code.square().mean()) == pytest.approx(1.0, rel=1e-4)


def test_tfidf_is_what_it_says() -> None:
    """The components are the right singular vectors of the matrix of documents, whose rows `encode` projects on them."""
    encoder = TfidfEncoder.fit(CODE + LAW, 4)
    identity = encoder.components.T @ encoder.components
    assert torch.allclose(identity, torch.eye(4), atol=1e-4)
    encoded = encoder.encode(CODE + LAW)
    products = encoded.T @ encoded
    assert torch.allclose(products, torch.diag(products.diagonal()), atol=1e-2 * float(products.max()))


@pytest.mark.parametrize("kind", ["tfidf", "hidden"])
def test_saved_and_loaded_it_says_the_same(tmp_path: Path, kind: str) -> None:
    seed, _ = write_branches(tmp_path, ())
    encoder = fit_encoder(kind, {"code": CODE, "law": LAW}, seed_model=seed, width=8)
    folder = tmp_path / "mixture" / DOMAIN_ENCODER
    folder.mkdir(parents=True)
    encoder.save(folder)
    assert torch.equal(load_encoder(tmp_path / "mixture").encode(MORE_CODE), encoder.encode(MORE_CODE))


def test_what_has_no_embedding() -> None:
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

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]  # fmt: skip
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
