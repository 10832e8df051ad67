"""Weight decay acts on matrices, found by their role and not by their number of axes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from koine.model.language_model import LanguageModel

_LINEAR_MAPS = (nn.Linear, nn.Bilinear, nn.Embedding, _ConvNd, nn.MultiheadAttention)
# Names of parameters that scale or shift, in modules of any class. The first two are of state space models,
# whose authors leave them undecayed (arXiv 2312.00752, reference implementation).
_NOT_MATRICES = frozenset({"a_log", "d", "scale", "gain", "gamma", "beta"})


def decayed_parameters(model: LanguageModel) -> set[str]:
    """Return the names of the parameters that weight decay acts on, as in `model.named_parameters()`.

    Decayed: weights of linear layers, embeddings, convolutions, routers and experts (stacked ones too).
    Not decayed: gains of norms whatever their shape (QK-Norm has one per head), biases (those of stacked
    experts too), and elementwise scales: A_log and D of state space models, mixing vectors of shape
    `[1, 1, hidden]`.
    """
    decayed = set()
    # A tied matrix has several names, of which `named_parameters` gives one.
    named = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if _is_matrix(module, prefix, name, parameter):
                decayed.add(f"{prefix}.{name}" if prefix else name)
    return decayed & named


def block_matrices(model: LanguageModel) -> set[str]:
    """Return the names of the two-dimensional weights that Muon updates, as in `model.named_parameters()`.

    They are the decayed parameters with two axes, without embeddings and the output matrix. Stacked experts
    have three axes.
    """
    head = getattr(model, "output_weight", None)
    excluded = {id(module.weight) for _, module in model.named_modules() if isinstance(module, nn.Embedding)}
    output = getattr(getattr(model, "inner", model), "get_output_embeddings", lambda: None)()
    excluded |= {id(tensor) for tensor in (head, getattr(output, "weight", None)) if tensor is not None}
    decayed = decayed_parameters(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if name in decayed and parameter.dim() == 2 and id(parameter) not in excluded
    }


def _is_matrix(module: nn.Module, prefix: str, name: str, parameter: Tensor) -> bool:
    if parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False):
        return False
    leaf = name.lower()
    if "bias" in leaf:
        return False
    if isinstance(module, _LINEAR_MAPS):
        return True
    owner = type(module).__name__.lower() + "/" + prefix.rpartition(".")[2].lower()
    if "norm" in owner or "norm" in leaf or leaf in _NOT_MATRICES:
        return False
    # A vector may have axes of size 1 for broadcasting.
    return sum(size > 1 for size in parameter.shape) >= 2
