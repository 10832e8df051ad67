"""What `transformers` itself reads from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def loaded_by_transformers(path: Path) -> Any:
    """Return the model that `AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)` builds, in float32.

    That call needs the package `accelerate`, and the function behind it does not.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model
