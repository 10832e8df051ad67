"""Files beside a model's weights are copied; weights of the old model are left behind with a warning."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.combine.merging.budget import estimate_merge
from koine.combine.merging.config import MergeConfig
from koine.combine.merging.cross_modal import merge_cross_modal
from koine.combine.merging.plan import plan_merge
from koine.combine.merging.runner import run_merge
from koine.combine.moe.add_expert import add_expert, remove_expert
from koine.combine.moe.upcycle import average, upcycle_btx
from koine.errors import KoineWarning, UserError
from koine.files import read_json
from koine.model.adapt import move_model
from koine.model.formats.carried_files import carry_files
from tests.combine.merge_configs import config_of
from tests.combine.models import write_branches

BESIDE = {
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "preprocessor_config.json": "{}",
    "config_sentence_transformers.json": '{"similarity_fn_name": "cosine"}',
    "processor/deep/down/words.txt": "words",
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "LICENSE": "of the model",
}
NOT_CARRIED = (
    "README.md",
    "checkpoint-500/config.json",
    "optimizer.pt",
    "trainer_state.json",
    "training_args.bin",
    ".git/config",
    "runs/events",
)
STALE = ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", "model-q4.gguf")


def write_beside(model: Path, *names: str) -> None:
    for name in names:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(BESIDE.get(name, "old"))


def branches_of(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A seed and two branches, files beside the weights of each."""
    seed, branches = write_branches(folder, ("a", "b"))
    for path in (seed, *branches.values()):
        write_beside(path, *BESIDE, *NOT_CARRIED)
    return seed, branches


def _merge(folder: Path) -> None:
    seed, branches = branches_of(folder)
    run_merge(config_of("linear", {"base": seed, **branches}), folder / "out")


def _average(folder: Path) -> None:
    seed, branches = branches_of(folder)
    average(seed, branches, folder / "out")


def _upcycle(folder: Path) -> None:
    seed, branches = branches_of(folder)
    upcycle_btx(seed, branches, folder / "out")


def _add(folder: Path) -> None:
    seed, branches = branches_of(folder)
    upcycle_btx(seed, {"a": branches["a"]}, folder / "mixture")
    add_expert(folder / "mixture", branches["b"], folder / "out", name="b", texts=None, reset_router=True)


def _remove(folder: Path) -> None:
    seed, branches = branches_of(folder)
    upcycle_btx(seed, branches, folder / "mixture")
    remove_expert(folder / "mixture", "b", folder / "out")


def _move(folder: Path) -> None:
    _, branches = branches_of(folder)
    # A template of the old tokenizer is the tokenizer's, not the model's.
    shutil.rmtree(branches["a"] / "additional_chat_templates")
    move_model(branches["a"], folder / "tokenizer", folder / "out")
    write_beside(folder / "out", "additional_chat_templates/rag.jinja")


@pytest.mark.parametrize("make", [_merge, _average, _upcycle, _add, _remove, _move])
def test_sub_folders_and_files_are_copied(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    for name, content in BESIDE.items():
        assert (tmp_path / "out" / name).read_text() == content, name
    for name in NOT_CARRIED:
        assert not (tmp_path / "out" / name).exists() or name == "README.md"


def test_a_cross_modal_merge_copies_the_multimodal_models_files(tmp_path: Path) -> None:
    _, branches = branches_of(tmp_path)
    stored = load_file(branches["a"] / "model.safetensors")
    save_file(
        {f"language_model.{name}": tensor for name, tensor in stored.items()},
        branches["a"] / "model.safetensors",
    )
    write_beside(branches["a"], "pytorch_model.bin")
    with pytest.warns(KoineWarning, match=r"left behind, .*: pytorch_model.bin$"):
        merge_cross_modal(branches["a"], branches["b"], tmp_path / "out", alpha=0.5)
    for name, content in BESIDE.items():
        assert (tmp_path / "out" / name).read_text() == content, name
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_weights_of_the_old_model_are_left_behind_with_a_warning(
    models: dict[str, Path], tmp_path: Path
) -> None:
    write_beside(models["a"], *STALE)
    with pytest.warns(KoineWarning, match=r"model-q4.gguf, pytorch_model.bin, tf_model.h5 and 1 more"):
        report = run_merge(config_of("linear", models), tmp_path / "out")
    assert report["left_behind"] == ["model-q4.gguf", "pytorch_model.bin", "tf_model.h5", "onnx/"]
    assert not any((tmp_path / "out" / name).exists() for name in STALE)


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "blobs" / "templates").mkdir(parents=True)
    (tmp_path / "blobs" / "templates" / "rag.jinja").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "additional_chat_templates").symlink_to(tmp_path / "blobs" / "templates")
    (tmp_path / "model" / "loop").symlink_to(tmp_path / "model")
    (tmp_path / "model" / "gone").symlink_to(tmp_path / "nowhere")
    assert carry_files(tmp_path / "model", tmp_path / "out") == []
    assert [
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    ] == ["additional_chat_templates/rag.jinja"]


@pytest.fixture
def sentence_models(tmp_path: Path) -> dict[str, Path]:
    """Two sentence models with a dense layer after pooling."""
    modules = pytest.importorskip("sentence_transformers.models")
    transformers = pytest.importorskip("transformers")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "wide", "river", "mill", "old"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    found = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        transformers.BertModel(config).save_pretrained(tmp_path / "bert")
        transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            word = modules.Transformer(str(tmp_path / "bert"))
            dense = modules.Dense(16, 8)
            dense.linear.bias.data.normal_()
            model = sentence_transformers.SentenceTransformer(
                modules=[word, modules.Pooling(16), dense, modules.Normalize()], device="cpu"
            )
            model.save(str(tmp_path / name))
        found[name] = tmp_path / name
    return found


def sentence_config(models: dict[str, Path], **more: Any) -> MergeConfig:
    fields: dict[str, Any] = {"method": "linear", "weights": (0.25, 0.75), "unrelated": True, **more}
    return MergeConfig(models=(models["a"], models["b"]), **fields)


def test_a_sentence_model_opens_and_computes_the_average(
    sentence_models: dict[str, Path], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    config = sentence_config(sentence_models)
    run_merge(config, tmp_path / "out")
    opened = {name: SentenceTransformer(str(path), device="cpu") for name, path in sentence_models.items()}
    merged = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert [type(one).__name__ for one in merged] == ["Transformer", "Pooling", "Dense", "Normalize"]
    # The average of both models' weights, every module's, put in place by their own library.
    theirs = opened["b"].state_dict()
    opened["a"].load_state_dict(
        {
            name: 0.25 * one + 0.75 * theirs[name] if one.is_floating_point() else one
            for name, one in opened["a"].state_dict().items()
        }
    )
    texts = ["a wide river", "old mill"]
    wanted, found = (torch.tensor(model.encode(texts)) for model in (opened["a"], merged))
    assert torch.allclose(found, wanted, atol=1e-6)
    assert (
        "linear.weight" in read_json(tmp_path / "out" / "merge_report.json")["modules"]["2_Dense"]["tensors"]
    )
    plan = plan_merge(config)
    written = sum(
        tensor.numel() * tensor.element_size()
        for file in (tmp_path / "out").rglob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert estimate_merge(plan, 1).output_bytes == written
    plan.close()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_module_of_the_first_model_alone_is_copied(
    sentence_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(sentence_models["a"], base, ignore=shutil.ignore_patterns("modules.json", "*_*"))
    config = sentence_config(sentence_models, method="task-arithmetic", base=base)
    with pytest.warns(
        KoineWarning, match=r"the weights of 2_Dense are those of .*a: .*base/2_Dense has none"
    ):
        run_merge(config, tmp_path / "out")
    first, second = (
        path / "2_Dense" / "model.safetensors" for path in (sentence_models["a"], tmp_path / "out")
    )
    assert first.read_bytes() == second.read_bytes()


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda b: _edit(b / "2_Dense" / "config.json", activation_function="torch.nn.ReLU"),
            "activation_function is torch.nn.ReLU, and",
        ),
        (
            lambda b: _edit(b / "1_Pooling" / "config.json", pooling_mode="cls", pooling_mode_cls_token=True),
            "pooling_mode.* is .*, and",
        ),
        (lambda b: (b / "modules.json").write_text("{}"), "modules.json: names no modules"),
        (lambda b: (b / "modules.json").write_text('[{"path": "../out"}]'), "names a folder outside its own"),
        (
            lambda b: (b / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]'),
            "has the modules 1_Pooling, and",
        ),
        (
            lambda b: (b / "2_Dense" / "model.safetensors").write_bytes(b"cut"),
            "2_Dense/model.safetensors: not a whole safetensors file",
        ),
        (
            lambda b: (b / "2_Dense" / "model.safetensors").rename(b / "2_Dense" / "pytorch_model.bin"),
            "the weights of 2_Dense are those of|no safetensors file",
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused(
    sentence_models: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(sentence_models["b"])
    with pytest.raises((UserError, KoineWarning), match=says):
        run_merge(sentence_config(sentence_models), tmp_path / "out")
    assert not (tmp_path / "out").exists()
