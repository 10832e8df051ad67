"""GGUF files of every family, computed by llama.cpp where it is installed, and read by `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from koine.errors import KoineWarning, UserError
from koine.model.formats.gguf import export_gguf
from tests.model.families import gguf_export
from tests.model.families.cases import CASES, ORIGINAL_LENGTH, Case, first_case, model_types
from tests.model.families.gguf_export import AS_RELEASED, PEER, READ_BY_TRANSFORMERS, WINDOW

gguf = pytest.importorskip("gguf", reason="the export needs the extra [gguf]")
transformers = pytest.importorskip("transformers", reason="the comparison needs the extra [hf]")

REFUSED = {
    "llama-dynamic": "its RoPE is scaled by the length of the text ('dynamic')",
    "llama-yarn-all-fields": "YaRN's beta_fast and beta_slow are 1.5 and 0.5",
    "smollm3-untied-biases": "it has biases of the attention's output",
    "smollm3-windowed": "layer 1 has no RoPE",
    "smollm3-windows-with-rope": "layer 2 has no RoPE",
    "smollm3-yarn": "layer 1 has no RoPE",
    "qwen3-untied-biases": "it has biases of the attention's output",
    "gemma2-no-caps": "its scores are not soft-capped",
    "gemma2-untied": "its output matrix is not the embedding",
    "olmo2-mha-tied-biases": "it has biases of the attention's output",
    "starcoder2-no-biases-untied": "it has no biases of q, k and v",
    "qwen2_moe-windowed": "the weights of a token's experts are divided by their sum",
    "qwen3_moe-head-dim": "the weights of a token's experts are not divided by their sum",
    "qwen3_moe-windowed-biases": "it has biases of the attention's output",
    "olmoe-gqa": "4 query heads share 2 key heads",
    "olmoe-normalised": "it has biases of the attention's output",
    "flex_olmo-gqa": "it is a flex_olmo",
    "flex_olmo-normalised-tied": "it is a flex_olmo",
    "cohere-qk-norm": "3 layers with QK-norm",
    "cohere-untied-biases": "its output matrix is not the embedding",
    "cohere-qk-norm-biases": "it has biases of the attention's output",
    "cohere2-biases": "it has biases of the attention's output",
    "cohere2-untied": "its output matrix is not the embedding",
}
"""What llama.cpp would compute differently, or not read; seen in its source (`src/models/`)."""
EXPORTED = [
    *(case for case in CASES if str(case) not in REFUSED),
    *(gguf_export.as_released(first_case(model_type)) for model_type in AS_RELEASED),
]


@pytest.mark.skipif(
    not PEER.exists(), reason="the peer is not installed: python benchmarks/peers/install.py llama_cpp"
)
@pytest.mark.parametrize("case", EXPORTED, ids=str)
def test_llama_cpp_computes_the_same(case: Case, tmp_path: Path) -> None:
    gguf_export.same_in_llama_cpp(*gguf_export.exported(case, tmp_path))


@pytest.mark.parametrize("model_type", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(model_type: str, tmp_path: Path) -> None:
    case = gguf_export.for_transformers(first_case(model_type))
    gguf_export.same_in_transformers(*gguf_export.exported(case, tmp_path))


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in REFUSED], ids=str)
def test_what_llama_cpp_cannot_compute_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        gguf_export.exported(case, tmp_path)
    assert f"llama.cpp has no architecture for this model: {REFUSED[str(case)]}" in error.value.what
    assert not (tmp_path / "file" / "model.gguf").exists()


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("gemma2", {"query_pre_attn_scalar": 23}, "its scores are scaled by 0.2085"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("qwen2", {"head_dim": 16}, "4 heads of 16 are not the hidden size 48"),
        ("qwen2", {"rope_parameters": first_case("llama").changes["rope_parameters"] | {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
        }}, "its RoPE is scaled as in Llama 3"),
    ],
)  # fmt: skip
def test_more_that_is_refused(model_type: str, changes: dict[str, object], says: str, tmp_path: Path) -> None:
    from koine.model.formats.config_json import from_json
    from koine.model.formats.gguf_architectures import architecture_of

    fields = gguf_export.with_tokenizer(first_case(model_type)).fields() | changes
    config = transformers.AutoConfig.for_model(model_type, **fields).to_dict()
    with pytest.raises(UserError, match="llama.cpp has no architecture") as error:
        architecture_of(from_json(config, where=tmp_path), where=tmp_path)
    assert says in error.value.what


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "starcoder2"])
def test_the_context_is_the_window_where_llama_cpp_has_none(model_type: str, tmp_path: Path) -> None:
    folder, out = gguf_export.exported(first_case(model_type), tmp_path)
    with pytest.warns(KoineWarning, match=f"has no windows. The file states a context of {WINDOW} tokens"):
        export_gguf(folder, out, overwrite=True)
    fields = gguf.GGUFReader(out).fields
    name = fields["general.architecture"].contents()
    assert fields[f"{name}.context_length"].contents() == WINDOW
    assert f"{name}.attention.sliding_window" not in fields


def test_the_factors_of_llama_3_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    case = next(case for case in CASES if str(case) == "llama-llama3")
    folder, out = gguf_export.exported(case, tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    size = config.head_dim
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}["rope_freqs.weight"]
    torch.testing.assert_close(torch.from_numpy(written.copy()), plain / scaled)
    assert len({round(float(one), 3) for one in written}) > 1


NOT_IMPORTED = ("starcoder2", "flex_olmo")
"""Families that are not imported, or not exported."""


@pytest.mark.parametrize("model_type", [kind for kind in model_types() if kind not in NOT_IMPORTED])
def test_an_import_gives_the_tensors_back(model_type: str, tmp_path: Path) -> None:
    from koine.model.formats.importing.runner import import_model

    folder, out = gguf_export.exported(gguf_export.as_released(first_case(model_type)), tmp_path)
    import_model(out, tmp_path / "again")
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # Adding 1 to the norms of Gemma and taking it off again rounds.
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6, msg=name)
