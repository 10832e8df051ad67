"""The class of `transformers` that a reward model is saved as, and classes of ours where it has none.

Needs the extra `[hf]`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification

from koine.errors import UserError
from koine.model.families import families
from koine.model.formats.reward_files import CLASSIFIER, LANGUAGE, SCORE


def classification_class(config: type[Any]) -> Any:
    """Return the class of sequence classification with a head `score` for a causal LM's configuration class.

    Where `transformers` has none, it is made of its generic head and the model's base class, and registered
    with `AutoModelForSequenceClassification`.
    """
    auto = transformers.models.auto.modeling_auto
    known = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if config in known:
        return known[config]
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING[config]
    [base, *_] = [one for one in causal.__mro__ if one.__name__.endswith("PreTrainedModel")]
    made = type(
        causal.__name__.replace(LANGUAGE, CLASSIFIER),
        (GenericForSequenceClassification, base),
        {
            "__doc__": f"{causal.__name__} with a linear head that scores a sequence.",
            "__module__": __name__,
            "base_model_prefix": causal.base_model_prefix,
            "config_class": config,
        },
    )
    # Without exist_ok the library ignores a class of ours for a configuration of its own.
    transformers.AutoModelForSequenceClassification.register(config, made, exist_ok=True)
    return made


def register_classifiers() -> None:
    """Let `AutoModelForSequenceClassification` open every reward model that our decoder is saved as."""
    from koine.model.formats.transformers_classes import KoineConfig, KoineForSequenceClassification

    transformers.AutoModelForSequenceClassification.register(KoineConfig, KoineForSequenceClassification)
    for model_type in families():
        if model_type in transformers.CONFIG_MAPPING:
            classification_class(transformers.CONFIG_MAPPING[model_type])


def build_classifier(config: Any, state: Mapping[str, Tensor], score: Tensor, *, padding: int | None) -> Any:
    """Return a model of sequence classification with the weights of a causal LM and a head `[1, hidden]`.

    Args:
        config: of the causal LM, which stays as it is.
        state: of the causal LM; its head is left out.
        score: the head.
        padding: `pad_token_id`; None: that of `config`.

    Raises:
        UserError: the class has another kind of head.
    """
    kind = classification_class(type(config))
    config = copy.deepcopy(config)
    config.num_labels = 1
    config.architectures = None
    if padding is not None:
        config.get_text_config().pad_token_id = padding
    with torch.device("meta"):
        model = kind(config)
    head: Any = getattr(model, "score", None)
    prefix = f"{model.base_model_prefix}."
    wanted = model.state_dict().keys()
    tensors = {name: tensor for name, tensor in state.items() if name.startswith(prefix)} | {SCORE: score}
    if not isinstance(head, nn.Linear) or wanted != tensors.keys():
        raise UserError(
            f"{kind.__name__} has another head than one matrix after the last layer",
            hint="choose a model with such a class, or one that Koine's own decoder computes",
        )
    model.load_state_dict(tensors, strict=True, assign=True)
    return model
