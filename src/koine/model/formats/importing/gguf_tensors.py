"""Find the tensors of `transformers`' class in a GGUF file, and undo what llama.cpp's converter did to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from koine.errors import UserError
from koine.model.formats.importing.architectures import Shapes
from koine.model.formats.importing.gguf_config import GgufConfig
from koine.model.formats.importing.gguf_file import GgufFile, StoredTensor
from koine.model.formats.importing.gguf_types import EXACT, gguf_library
from koine.model.formats.importing.plan import ImportedTensor

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_COMPARED_BYTES: Final = 2**24
Rows = Callable[[int, int], Tensor]


def default_dtype(file: GgufFile) -> torch.dtype:
    """Return the dtype of the matrices, where all have the same one and none is quantised; else float32.

    Norms and routers are float32 in every GGUF file. They are written in the dtype of the matrices, from which they were
    converted.
    """
    kinds = {
        tensor.kind.name
        for tensor in file.tensors.values()
        if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name
    }
    return EXACT.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def plan_tensors(file: GgufFile, config: GgufConfig, dtype: torch.dtype) -> list[ImportedTensor]:
    """Return the tensors to write, and complete `config.content` by what they show: biases, a tied head.

    Raises `UserError` for tensors that are missing, of another shape than the metadata say, or not known.
    """
    return _Planner(file, config, dtype).plan()


class _Planner:
    def __init__(self, file: GgufFile, config: GgufConfig, dtype: torch.dtype) -> None:
        self.file, self.config, self.dtype = file, config, dtype
        gguf = gguf_library()
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self.names = gguf.get_tensor_name_map(numbers[config.name], config.blocks)
        self.used: set[str] = set(config.extra_tensors)

    def plan(self) -> list[ImportedTensor]:
        """See `plan_tensors`."""
        found = [*self._tensor(EMBEDDING, "vh")]
        shapes = dict(self.config.architecture.block)
        for switch, more in self.config.architecture.switches.items():
            on = self._stored_name(f"model.layers.0.{next(iter(more))}") in self.file.tensors
            self.config.content[switch] = on
            shapes |= more if on else {}
        for index in range(self.config.blocks):
            found += self._block(index, shapes)
        found += self._tensor(NORM, "h")
        found += self._head()
        left = sorted(self.file.tensors.keys() - self.used)
        if left:
            raise UserError(
                f"has {len(left)} tensors that '{self.config.name}' has not: {', '.join(left[:3])}",
                where=self.file.where,
                hint="give a file of a plain model of this architecture",
            )
        return found

    def _block(self, index: int, shapes: Shapes) -> Iterator[ImportedTensor]:
        for template, shape in shapes.items():
            name = f"model.layers.{index}.{template}"
            if "*" not in name:
                yield from self._tensor(name, shape)
                continue
            for expert in range(self.config.sizes["e"]):
                yield self._expert(name, shape, expert)

    def _head(self) -> Iterator[ImportedTensor]:
        """Yield the output matrix, where the file has one that is not the embedding."""
        output = self.file.tensors.get("output.weight")
        tied = output is None or self._same(output, self.file.tensors["token_embd.weight"])
        self.config.content["tie_word_embeddings"] = tied
        if not tied:
            yield from self._tensor(HEAD, "vh")
        elif output is not None:
            self.used.add(output.name)

    def _same(self, one: StoredTensor, other: StoredTensor) -> bool:
        """Return whether two tensors hold the same bytes."""
        if (one.shape, one.kind) != (other.shape, other.kind):
            return False
        step = max(1, _COMPARED_BYTES // one.row_bytes)
        return all(
            bytes(self.file.read(one, start, min(one.rows, start + step)))
            == bytes(self.file.read(other, start, min(one.rows, start + step)))
            for start in range(0, one.rows, step)
        )

    def _stored_name(self, name: str) -> str:
        """Return the name in the file of a tensor of `transformers`."""
        stem, _, ending = name.rpartition(".")
        found = self.names.get_name(stem)
        assert found is not None, name
        return f"{found}.{ending}"

    def _find(self, name: str, stored: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = self.file.tensors.get(stored)
        if tensor is None:
            raise UserError(
                f"lacks the tensor {stored} ({name})", where=self.file.where, hint="the file is damaged"
            )
        # A matrix of one row is stored as a vector.
        if tensor.shape not in (shape, tuple(size for size in shape if size > 1)):
            raise UserError(
                f"{stored} has the shape {list(tensor.shape)}, and the metadata say {list(shape)}",
                where=self.file.where,
                hint="the file is damaged",
            )
        self.used.add(stored)
        return tensor

    def _tensor(self, name: str, letters: str) -> Iterator[ImportedTensor]:
        shape = tuple(self.config.sizes[letter] for letter in letters)
        stored = self._find(name, self._stored_name(name), shape)

        def rows(start: int, stop: int) -> Tensor:
            if len(stored.shape) == 1:
                return stored.kind.values(self.file.read(stored, 0, 1)).reshape(shape)[start:stop]
            values = stored.kind.values(self.file.read(stored, start, stop))
            return values.reshape(stop - start, *shape[1:])

        read: Rows = rows
        part = name.rpartition("self_attn.")[2].split(".")[0]
        permuted = self.config.architecture.permuted and part in ("q_proj", "k_proj")
        if permuted:
            heads = self.config.sizes["n" if part == "q_proj" else "m"]

            def read(start: int, stop: int) -> Tensor:
                return halves(rows(start, stop), heads)

        elif self.config.architecture.norm_offset and name.endswith("norm.weight"):

            def read(start: int, stop: int) -> Tensor:
                return rows(start, stop) - 1

        yield ImportedTensor(name=name, shape=shape, dtype=self.dtype, read=read, whole=permuted)

    def _expert(self, template: str, letters: str, expert: int) -> ImportedTensor:
        """Return one expert's matrix, a slice of the stacked tensor [experts, rows, columns]."""
        shape = tuple(self.config.sizes[letter] for letter in letters)
        name = template.replace("*", str(expert))
        stacked = (self.config.sizes["e"], *shape)
        stored = self._find(name, self._stored_name(template.replace("experts.*", "experts")), stacked)

        def read(start: int, stop: int) -> Tensor:
            assert (start, stop) == (0, shape[0])
            return stored.kind.values(self.file.read(stored, expert, expert + 1).reshape(shape[0], -1))

        return ImportedTensor(name=name, shape=shape, dtype=self.dtype, read=read, whole=True)


def halves(rows: Tensor, heads: int) -> Tensor:
    """Order the rows of q or k for rotation in halves, as `transformers` rotates.

    llama.cpp rotates neighbouring pairs of these families, so its converter interleaves the two halves of
    each head: row `2 i` comes from row `i`, and row `2 i + 1` from row `head_dim / 2 + i`.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def quantisation(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, Any]]:
    """Return, by type, the number of tensors and their bytes in the file."""
    found: dict[str, dict[str, Any]] = {}
    for tensor in tensors.values():
        one = found.setdefault(tensor.kind.name, {"tensors": 0, "bytes": 0})
        one["tensors"] += 1
        one["bytes"] += tensor.nbytes
    return found
