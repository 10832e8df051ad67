"""GGUF files, read back by the `gguf` package and run by llama.cpp where `llama_cpp` is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from koine.cli.main import cli
from koine.errors import KoineWarning, UserError
from koine.generate import generate
from koine.generate.sampling import Sampling
from koine.model import (
    PRESETS,
    Decoder,
    LayerSpec,
    ModelConfig,
    hybrid_layers,
    load_model,
    preset,
    save_model,
)
from koine.model.formats.gguf import export_gguf
from koine.model.formats.gguf_architectures import architecture_of, standard_hybrid
from koine.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf", reason="the export needs the extra [gguf]")

PEER = Path(__file__).resolve().parents[3] / ".venv-peers" / "llama_cpp" / "bin" / "python"
needs_llama_cpp = pytest.mark.skipif(
    not PEER.exists(), reason="the peer is not installed: python benchmarks/peers/install.py llama_cpp"
)

# float32 on both sides with float32 caches: sums in another order, and llama.cpp's own vectorised exp in
# softmax and SiLU. Seen are 2e-6 to 5e-6 in logits of up to 3; this leaves ten times as much. A window wrong
# by one position gives 2 (tested below).
LLAMA_CPP = 5e-5

TEXTS = {
    "en": "The quick brown fox isn't lazy; NASA's 12 rockets cost 1,234.50 dollars in 2026.",
    "de": "Der Fluß fließt über GRÜNE Wiesen, 25 Kilometer weit.",
    "fr": "L’été à l'ÉCOLE DE CRÉDIT, c’est déjà fini à 18h30 !",
    "ru": "Москва — столица России; ГазПром, 1 234 рубля.",
    "el": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.",
    "hi": "मुंबई में २०२६ की बारिश हुई, कि नहीं?",
    "bn": "ঢাকা বাংলাদেশের রাজধানী ১২৩।",
    "th": "กรุงเทพฯ เป็นเมืองหลวงของไทย ก่อน ๑๒",
    "ar": "القاهرةُ عاصمةُ مِصر، ١٢٣ كيلومترًا",
    "he": "יְרוּשָׁלַיִם היא עיר.",
    "ja": "東京2020年です。「はい」、カタカナ。",
    "zh": "我想在apple工作1314天～北京。",
    "ko": "서울은 대한민국의 수도입니다. 3월 1일",
    "am": "አዲስ አበባ ፲፪ ናት።",
    "vi": "Thủ đô của Việt Nam là Hà Nội.",
    "code": "def f(x):\n    return 12 + x  # 3\n\n\n\tif x ==    5:\r\n        y = 'it''s'  \n",
    "odd": "  a\u00a0b\u3000c \u200d🙂👨‍👩‍👧 <BOS_TOKEN> TILE_1 x/y//\n/z ½² iPhone naïveTest ПриветМир ÀBÀB",
}

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    # Each text several times, so that merges across characters, runs of spaces and capitals are learned.
    texts = {code: [text] * 8 for code, text in TEXTS.items() if code not in ("code", "odd")}
    texts["en"] += [TEXTS["code"], TEXTS["odd"]] * 8
    # Numbers enough in the scripts of these texts that each of their digits is a token.
    for zero in "०০٠᮰":
        texts["en"] += [" ".join(chr(ord(zero) + value) for value in range(10))] * 60
    sources = {code: (lambda own=own: own) for code, own in texts.items()}
    return train_tokenizer(sources, vocab_size=900, scheme="natural", english_share=None, min_frequency=1)


def config_for(tokenizer: Tokenizer, layers: tuple[LayerSpec, ...]) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.vocab_size + 5,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        layers=layers,
        rope_theta=5_000.0,
        initializer_range=0.15,
        logit_scale=0.5,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


HYBRID = hybrid_layers(8, window=24)
COHERE = (LayerSpec(),) * 3


def saved(tokenizer: Tokenizer, folder: Path, layers: tuple[LayerSpec, ...], **changes: Any) -> Path:
    """A random model directory with the tokenizer beside it."""
    torch.manual_seed(0)
    tokenizer.save(folder / "tokenizer")
    model = Decoder(replace(config_for(tokenizer, layers), **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # A norm's weight of one everywhere would hide one norm taken for another.
                parameter.uniform_(0.5, 1.5)
    save_model(model, folder / "model", tokenizer=folder / "tokenizer")
    return folder / "model"


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("layers", [HYBRID, COHERE], ids=["cohere2", "command-r"])
def test_keys_and_tensors_read_back(
    tokenizer: Tokenizer, layers: tuple[LayerSpec, ...], tmp_path: Path
) -> None:
    model = saved(tokenizer, tmp_path, layers)
    out = tmp_path / "new" / "model.gguf"
    export_gguf(model, out)
    found = fields(out)
    name = "cohere2" if layers is HYBRID else "command-r"
    expected = {
        "general.architecture": name,
        "general.file_type": 0,
        f"{name}.vocab_size": tokenizer.vocab_size + 5,
        f"{name}.context_length": 512,
        f"{name}.embedding_length": 64,
        f"{name}.feed_forward_length": 96,
        f"{name}.block_count": len(layers),
        f"{name}.attention.head_count": 4,
        f"{name}.attention.head_count_kv": 2,
        f"{name}.attention.layer_norm_epsilon": pytest.approx(1e-5),
        f"{name}.logit_scale": 0.5,
        f"{name}.rope.freq_base": 5_000.0,
        f"{name}.rope.dimension_count": 16,
        f"{name}.rope.scaling.type": "none",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tiny_aya",
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found.get("cohere2.attention.sliding_window") == (24 if layers is HYBRID else None)
    assert "cohere2.attention.sliding_window_pattern" not in found
    vocabulary = found["tokenizer.ggml.tokens"]
    assert {vocabulary[index]: index for index in range(tokenizer.vocab_size)} == tokenizer.vocabulary()
    assert vocabulary[-1] == f"[PAD{tokenizer.vocab_size + 4}]"
    types = found["tokenizer.ggml.token_type"]
    assert {types[index] for index in range(len(types) - 5, len(types))} == {gguf.TokenType.UNUSED}
    assert types[tokenizer.bos_id] == types[vocabulary.index("TILE_1")] == gguf.TokenType.CONTROL
    assert types.count(gguf.TokenType.NORMAL) == len(found["tokenizer.ggml.merges"]) + 256

    decoder = load_model(model)
    read = tensors(out)
    assert len(read) == 2 + 8 * len(layers)
    block = decoder.blocks[1]
    q, k, v, gate, up = block.in_proj.weight.split(decoder.config.projection_sizes)
    o, down = block.out_proj.weight.split([64, 96], dim=1)
    for ggml_name, tensor in {
        "token_embd.weight": decoder.embedding.weight,
        "output_norm.weight": decoder.norm.weight,
        "blk.1.attn_norm.weight": block.norm.weight,
        "blk.1.attn_q.weight": q,
        "blk.1.attn_k.weight": k,
        "blk.1.attn_v.weight": v,
        "blk.1.attn_output.weight": o,
        "blk.1.ffn_gate.weight": gate,
        "blk.1.ffn_up.weight": up,
        "blk.1.ffn_down.weight": down,
    }.items():
        np.testing.assert_array_equal(read[ggml_name].data, tensor.detach().numpy(), err_msg=ggml_name)


@pytest.mark.parametrize(
    ("dtype", "kind", "step"),
    [("float16", "F16", 2**-11), ("bfloat16", "BF16", 2**-8), ("q8_0", "Q8_0", 1 / 127)],
)
def test_smaller_dtypes(tokenizer: Tokenizer, dtype: str, kind: str, step: float, tmp_path: Path) -> None:
    """Matrices take the dtype, within half a step of the largest in their row; norms stay float32."""
    model = saved(tokenizer, tmp_path, HYBRID, intermediate_size=80)
    runner = CliRunner()
    out = tmp_path / "model.gguf"
    arguments = ["model", "export", str(model), "--format", "gguf", "--out", str(out), "--dtype", dtype]
    result = runner.invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert f"{out.stat().st_size:,} bytes" in result.output
    read = tensors(out)
    exact = load_model(model).embedding.weight.detach().numpy()
    assert read["token_embd.weight"].tensor_type.name == kind
    assert read["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    # Rows of 80 are no whole blocks of 32.
    assert read["blk.0.ffn_down.weight"].tensor_type.name == ("F16" if kind == "Q8_0" else kind)
    values = gguf.dequantize(read["token_embd.weight"].data, read["token_embd.weight"].tensor_type)
    assert np.abs(values - exact).max() <= step * np.abs(exact).max()
    assert np.abs(values - exact).max() > 0


def test_the_default_dtype_is_the_stored_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = saved(tokenizer, tmp_path, COHERE)
    save_model(load_model(model), tmp_path / "half", tokenizer=model, dtype=torch.bfloat16)
    export_gguf(tmp_path / "half", tmp_path / "half.gguf")
    assert tensors(tmp_path / "half.gguf")["blk.0.attn_q.weight"].tensor_type.name == "BF16"


@pytest.mark.parametrize(
    ("layers", "changes", "says"),
    [
        ((LayerSpec(window=8), LayerSpec(window=9), LayerSpec(rope=False)), {}, "windows differ (8, 9)"),
        ((LayerSpec(window=8, qk_norm="heads"), LayerSpec(rope=False)), {}, "layer 0 has QK-norm"),
        ((LayerSpec(window=8, rope=False),) * 2, {}, "layer 0 has a window and no RoPE"),
        ((LayerSpec(window=8), LayerSpec()), {}, "layer 1 is full with RoPE"),
        ((LayerSpec(rope=False),) * 2, {}, "no layer has a window"),
        ((LayerSpec(qk_norm="heads"),) * 2, {}, "2 layers with QK-norm"),
        ((LayerSpec(),) * 64, {}, "64 layers without QK-norm"),
        (HYBRID, {"tie_embeddings": False}, "output matrix is not the embedding"),
        (HYBRID, {"head_dim": 32}, "4 heads of 32 are not the hidden size 64"),
    ],
)
def test_models_that_llama_cpp_computes_differently_are_refused(
    tokenizer: Tokenizer, layers: tuple[LayerSpec, ...], changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        architecture_of(replace(config_for(tokenizer, layers), **changes), where=tmp_path / "config.json")
    assert says in str(error.value)
    assert error.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_exported(name: str, tmp_path: Path) -> None:
    config = preset(name)
    assert architecture_of(config, where=tmp_path).name == "cohere2"
    assert config.layers == standard_hybrid(config)


def test_command_r_plus_has_its_norms(tokenizer: Tokenizer, tmp_path: Path) -> None:
    layers = (LayerSpec(qk_norm="heads"),) * 64
    model = saved(tokenizer, tmp_path, layers, hidden_size=8, head_dim=2, intermediate_size=4)
    export_gguf(model, tmp_path / "m.gguf", dtype="float16")
    read = tensors(tmp_path / "m.gguf")
    assert read["blk.63.attn_q_norm.weight"].data.shape == (4, 2)
    assert read["blk.63.attn_k_norm.weight"].tensor_type.name == "F32"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("model", "tokenizer"))


def spoil_tokenizer(model: Path, key: str, value: Any) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content[key] = value
    (model / "tokenizer.json").write_text(json.dumps(content))


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    """llama.cpp ends with "cannot find tokenizer merges in model file"."""
    from koine.tokenizer.special import SMALLEST_VOCABULARY

    bytes_alone = train_tokenizer(
        {"en": lambda: ["text"]}, vocab_size=SMALLEST_VOCABULARY, scheme="natural", english_share=None
    )
    model = saved(bytes_alone, tmp_path, HYBRID)
    with pytest.raises(UserError, match="has no merges"):
        export_gguf(model, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_refused_export_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, out = saved(tokenizer, tmp_path, HYBRID), tmp_path / "model.gguf"
    good = (model / "tokenizer.json").read_text()
    for key, value, says in (
        ("normalizer", {"type": "Lowercase"}, "normaliser is Lowercase"),
        ("pre_tokenizer", {"type": "Whitespace"}, "no name for the expression"),
        ("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}, "no name for"),
    ):
        spoil_tokenizer(model, key, value)
        with pytest.raises(UserError, match=says):
            export_gguf(model, out)
        (model / "tokenizer.json").write_text(good)
    with pytest.raises(UserError, match="did you mean 'q8_0'"):
        export_gguf(model, out, dtype="q8")  # type: ignore[arg-type]
    for changes, says in (({"model_type": "gpt_neox"}, "a model of type 'gpt_neox' is not exported"),):
        config = (model / "config.json").read_text()
        (model / "config.json").write_text(json.dumps(json.loads(config) | changes))
        with pytest.raises(UserError, match=says):
            export_gguf(model, out)
        (model / "config.json").write_text(config)
    weights = load_model(model)
    with torch.no_grad():
        weights.blocks[7].in_proj.weight[0, 0] = 1e5
    save_model(weights, model)
    with pytest.raises(UserError, match="q_proj.weight holds 1e[+]05, which float16 cannot"):
        export_gguf(model, out, dtype="float16")
    export_gguf(model, out, dtype="q8_0")
    with pytest.raises(UserError, match="exists already"):
        export_gguf(model, out)
    out.unlink()
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        export_gguf(model, out)
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy says of a full disk how much it wrote, and gives no error number."""
    model = saved(tokenizer, tmp_path, COHERE)

    def short(*_: Any, **__: Any) -> None:
        raise OSError("4096 requested and 512 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", short)
    with pytest.raises(UserError, match="model.gguf: the disk is full"):
        export_gguf(model, tmp_path / "model.gguf")
    assert leftovers(tmp_path) == []


def test_a_missing_package_is_named(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tokenizer, tmp_path, COHERE)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="to export to GGUF, the package 'gguf' is needed"):
        export_gguf(model, tmp_path / "model.gguf")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    BYTE_LEVEL,
                ],
            },
            "command-r",
        ),
        (BYTE_LEVEL, "gpt-2"),
    ],
)
def test_other_byte_level_tokenizers(
    tokenizer: Tokenizer, pre_tokenizer: dict[str, Any], name: str, tmp_path: Path
) -> None:
    model, out = saved(tokenizer, tmp_path, COHERE), tmp_path / "model.gguf"
    spoil_tokenizer(model, "pre_tokenizer", pre_tokenizer)
    export_gguf(model, out)
    assert fields(out)["tokenizer.ggml.pre"] == name
    if PEER.exists():
        # Digits stand apart in one and go together in the other.
        assert llama_cpp(out, tmp_path, [], list(TEXTS.values()))["ids"] == [
            load_tokenizer(model).encode(text) for text in TEXTS.values()
        ]


def llama_cpp(path: Path, folder: Path, prompts: list[list[int]], texts: list[str]) -> dict[str, Any]:
    """What llama.cpp answers (see llama_cpp_peer.py), logits included."""
    request = {
        "model": str(path),
        "context": 256,
        "prompts": prompts,
        "new_tokens": 40,
        "texts": texts,
        "logits": str(folder / "logits.npz"),
    }
    process = subprocess.run(
        [str(PEER), str(Path(__file__).with_name("llama_cpp_peer.py"))],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    answer = json.loads(process.stdout)
    assert isinstance(answer, dict)
    logits = np.load(folder / "logits.npz")
    answer["logits"] = [torch.from_numpy(logits[str(number)]) for number in range(len(prompts))]
    return answer


def difference(model: Path, prompts: list[list[int]], answer: dict[str, Any]) -> float:
    """The largest difference of our logits and llama.cpp's."""
    decoder = load_model(model)
    with torch.no_grad():
        return max(
            float((decoder.logits(decoder(torch.tensor([prompt])))[0] - theirs).abs().max())
            for prompt, theirs in zip(prompts, answer["logits"], strict=True)
        )


def random_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Shorter than the window of 24, as long, one longer, and many times as long."""
    return [torch.randint(40, tokenizer.vocab_size, (length,)).tolist() for length in (5, 24, 25, 130)]


@needs_llama_cpp
@pytest.mark.parametrize(
    "layers",
    [
        HYBRID,
        COHERE,
        hybrid_layers(6, window=24, full_every=3),
        (LayerSpec(window=24),) * 5,
        (LayerSpec(rope=False), LayerSpec(window=24)),
    ],
    ids=["cohere2", "command-r", "every-third-full", "all-windowed", "full-first"],
)
def test_llama_cpp_computes_the_same_logits(
    tokenizer: Tokenizer, layers: tuple[LayerSpec, ...], tmp_path: Path
) -> None:
    model, out = saved(tokenizer, tmp_path, layers), tmp_path / "model.gguf"
    if layers in (HYBRID, COHERE):
        export_gguf(model, out)
    else:
        with pytest.warns(KoineWarning, match="not exactly every fourth layer is full"):
            export_gguf(model, out)
    prompts = random_prompts(tokenizer)
    answer = llama_cpp(out, tmp_path, prompts, list(TEXTS.values()))
    assert difference(model, prompts, answer) <= LLAMA_CPP
    # Nothing ends an answer there, so nothing may here.
    ours = generate(load_model(model), prompts, Sampling(max_new_tokens=40, temperature=0), stop_ids=())
    assert answer["answers"] == [one.tokens for one in ours]
    assert answer["ids"] == [tokenizer.encode(text) for text in TEXTS.values()]
    assert (answer["with_bos"], answer["eos"]) == ([tokenizer.bos_id], tokenizer.eos_id)


def test_a_warning_names_scripts_with_other_digits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A vocabulary of Bengali without numbers has merges that fit between two digits of three bytes each."""
    text = "ঢাকা বাংলাদেশের রাজধানী এবং বৃহত্তম শহর "
    bengali = train_tokenizer(
        {"bn": lambda: [text] * 8}, vocab_size=340, scheme="natural", english_share=None, min_frequency=1
    )
    model, out = saved(bengali, tmp_path, COHERE), tmp_path / "model.gguf"
    with pytest.warns(KoineWarning, match="digits of these scripts: .*Bengali") as caught:
        export_gguf(model, out)
    assert "Devanagari" not in str(caught[0].message)
    if PEER.exists():
        texts = ["১২৩", "১ ২ ৩", "123 4567", "१२३"]
        ours = [bengali.encode(text) for text in texts]
        theirs = llama_cpp(out, tmp_path, [], texts)["ids"]
        assert theirs[0] != ours[0]
        assert bengali.decode(theirs[0]) == texts[0]
        assert theirs[1:] == ours[1:]


@needs_llama_cpp
def test_a_window_off_by_one_is_detected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The comparison above can fail: the same weights with a window of 23 are far outside its tolerance."""
    model, out = saved(tokenizer, tmp_path, HYBRID), tmp_path / "model.gguf"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"sliding_window": 23}))
    export_gguf(model, out)
    (model / "config.json").write_text(json.dumps(config))
    prompts = random_prompts(tokenizer)[-1:]
    assert difference(model, prompts, llama_cpp(out, tmp_path, prompts, [])) > 100 * LLAMA_CPP


@needs_llama_cpp
def test_the_chat_template_renders_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its reader of Jinja knows no `generation` blocks, so they are written as plain ones."""
    import jinja2.sandbox

    model, out = saved(tokenizer, tmp_path, COHERE), tmp_path / "model.gguf"
    export_gguf(model, out)
    template = llama_cpp(out, tmp_path, [], [])["template"]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = (
        jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(messages=messages, bos_token="<BOS_TOKEN>", add_generation_prompt=True)
    )
    expected = tokenizer.encode_messages(messages, generation_prompt=True)[0]
    assert tokenizer._parsing_backend.encode(text, add_special_tokens=False).ids == expected
