"""What a user does with a checkpoint, on every family: each method against the class of `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from koine.model import read_config

from . import checks, methods, variants
from .cases import Case, first_case, model_types

FIRST = pytest.mark.parametrize("case", [first_case(kind) for kind in model_types()], ids=str)


def test_attention_weights(further_folder: Path) -> None:
    methods.attention_weights(further_folder)


def test_parameters_and_operations(further_folder: Path) -> None:
    methods.counts(further_folder)


def test_what_is_decayed_and_what_muon_updates(folder: Path) -> None:
    if read_config(folder).mixture is not None:
        pytest.skip("the experts of a class are stacked tensors in no linear map")
    methods.optimised_parameters(folder)


def test_gradients_of_packed_documents(further_folder: Path) -> None:
    methods.trains_on_packed_documents(further_folder)


def test_attention_variants_of_other_shapes(further_case: Case, further_folder: Path, tmp_path: Path) -> None:
    if further_case.dynamic:
        pytest.skip("the reference keeps the frequencies of its longest text")
    variants.attention_variants(further_folder, tmp_path, checks.agree)


@FIRST
def test_untied_vocabularies_are_extended(case: Case, tmp_path: Path) -> None:
    tied = not bool(case.changes.get("tie_word_embeddings"))
    other = Case(
        model_type=case.model_type, name="other", changes={**case.changes, "tie_word_embeddings": tied}
    )
    methods.vocabulary_extension(other, tmp_path)
