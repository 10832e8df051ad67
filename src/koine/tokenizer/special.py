"""Special tokens: names as in Cohere's public tokenizers, ids from 0 in this order."""

from __future__ import annotations

from typing import Final

PAD: Final = "<PAD>"
UNK: Final = "<UNK>"
CLS: Final = "<CLS>"
SEP: Final = "<SEP>"
MASK: Final = "<MASK_TOKEN>"
BOS: Final = "<BOS_TOKEN>"
START_OF_TURN: Final = "<|START_OF_TURN_TOKEN|>"
END_OF_TURN: Final = "<|END_OF_TURN_TOKEN|>"
USER: Final = "<|USER_TOKEN|>"
CHATBOT: Final = "<|CHATBOT_TOKEN|>"
SYSTEM: Final = "<|SYSTEM_TOKEN|>"

# Aya Vision cuts an image into at most twelve tiles and a thumbnail of the whole.
MAX_TILES: Final = 12

SPECIAL_TOKENS: Final[tuple[str, ...]] = (
    PAD,
    UNK,
    CLS,
    SEP,
    MASK,
    BOS,
    START_OF_TURN,
    END_OF_TURN,
    USER,
    CHATBOT,
    SYSTEM,
    "<|START_THINKING|>",
    "<|END_THINKING|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    "<|START_TOOL_RESULT|>",
    "<|END_TOOL_RESULT|>",
    "<|START_TEXT|>",
    "<|END_TEXT|>",
    "<|IMG_PATCH|>",
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_LINE_BREAK|>",
    *(f"TILE_{number}" for number in range(1, MAX_TILES + 1)),
    "TILE_GLOBAL",
)

# Every byte is a token, so that any text can be encoded, in longer sequences where the vocabulary lacks it.
ALPHABET_SIZE: Final = 256
SMALLEST_VOCABULARY: Final = ALPHABET_SIZE + len(SPECIAL_TOKENS)
