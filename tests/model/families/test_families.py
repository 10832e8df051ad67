"""Each family's checkpoints: same numbers as `transformers`, cached or not, and saved as they were read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import checks
from .cases import CASES, Case, first_case, model_types
from .conftest import Checkpoint


def test_every_family_has_cases() -> None:
    from koine.model.families import families

    assert families().keys() == set(model_types())
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)


def test_the_registered_names_are_those_of_transformers() -> None:
    """`model_type` and `architecture` of a family name one class of `transformers`."""
    import transformers

    from koine.model.families import families

    for model_type, family in families().items():
        config = transformers.AutoConfig.for_model(model_type, **first_case(model_type).fields())
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert (family.model_type, family.architecture) == (config.model_type, type(model).__name__)


def test_each_blocks_output_and_the_logits(further_folder: Path) -> None:
    checks.blocks_and_logits(further_folder)


def test_prefill_in_chunks_and_decode_past_the_window(further_folder: Path, further_case: Case) -> None:
    checks.cached(further_folder, further_case)


def test_left_padded_batches(further_folder: Path) -> None:
    checks.left_padded(further_folder)


def test_packed_documents_are_kept_apart(further_folder: Path) -> None:
    checks.packed_documents(further_folder)


def test_gradients(further_folder: Path) -> None:
    checks.gradients(further_folder)


def test_what_is_saved_is_what_was_read(further_folder: Path, tmp_path: Path) -> None:
    checks.saved_as_own_class(further_folder, tmp_path)


def test_what_is_saved_in_bfloat16_is_what_was_read(
    case: Case, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checks.saved_as_own_class(checkpoint(case, torch.bfloat16), tmp_path)


def test_bfloat16_is_as_close_to_float32_as_in_transformers(case: Case, checkpoint: Checkpoint) -> None:
    checks.bfloat16_logits(checkpoint(case, torch.bfloat16))


def test_older_spellings_of_rope(folder: Path, tmp_path: Path) -> None:
    checks.older_spelling(folder, tmp_path)


@pytest.mark.parametrize("one", [case for case in CASES if case.dynamic], ids=str)
def test_a_batch_has_the_greedy_tokens_of_generate(one: Case, checkpoint: Checkpoint) -> None:
    checks.batched_engine(checkpoint(one, torch.float32), one)
