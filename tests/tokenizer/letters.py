"""A tokenizer of single letters, for tests."""

from __future__ import annotations


class Letters:
    """A tokenizer of single letters; `pairs` are tokens too, other letters are unknown."""

    def __init__(self, letters: str, *, dear: str = "", twice: str = "") -> None:
        self.pieces = [*letters, *twice]
        self.vocab_size = len(self.pieces)
        self.unknown_id: int | None = None
        self._dear = dear

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """A letter of `dear` takes three tokens."""
        return [
            [self.pieces.index(one) for one in text for _ in range(3 if one in self._dear else 1)]
            for text in texts
        ]

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id].encode()

    def unknown_bytes(self, texts: list[str]) -> list[int]:
        return [0] * len(texts)
