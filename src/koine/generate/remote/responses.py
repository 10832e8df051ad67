"""Parse the response of a server that calls itself OpenAI-compatible: text, finish reason, usage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from koine.generate.remote.response_errors import MalformedError, malformed, read_error, server_message
from koine.generate.remote.response_fields import (
    find_choice,
    has_content,
    read_log_probabilities,
    read_reason,
    read_text,
    read_usage,
)
from koine.generate.remote.response_json import decode, parse_json, read_document

Finish = Literal["stop", "length"]

# Finish reasons of other servers, in lower case, without punctuation and the prefix "FINISH_REASON_".
STOP_REASONS = frozenset((
    "stop", "stopped", "eos", "eostoken", "eostokenid", "endturn", "endofturn", "endoftext",
    "stopsequence", "stoptoken", "stopstring", "stopstr", "stopword", "complete", "completed", "finished",
    "end", "done", "normal", "success",
))  # fmt: skip
LENGTH_REASONS = frozenset((
    "length", "lengthlimit", "maxtokens", "maxtoken", "maxlength", "maxlen", "maxnewtokens",
    "maxoutputtokens", "maxcompletiontokens", "modellength", "modelcontextwindowexceeded",
    "contextlength", "contextlengthexceeded", "tokenlimit", "outputlimit", "incomplete", "truncated",
    "limit", "errorlimit",
))  # fmt: skip
# Parts of finish reasons after which the text cannot be used.
REFUSAL_REASONS = (
    "contentfilter", "filter", "safety", "recitation", "blocklist", "prohibited", "spii", "sensitive",
    "refusal", "moderation", "blocked", "error", "toxic", "abort", "cancel", "tool", "function", "fail",
    "timeout", "insufficient", "pauseturn", "language",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParsedResponse:
    """A successful response.

    log_probabilities: natural, one a token; empty where the endpoint gives none.
    finish: "stop" or "length"; None for a refusal, a tool call or an error.
    reason: the endpoint's finish reason.
    usage: prompt tokens and completion tokens; None where the endpoint does not report them.
    unknown_reason: `reason` is unknown, and was taken for the end of the text.
    lost_log_probabilities: some were not finite numbers, and all are dropped.
    """

    text: str
    log_probabilities: tuple[float, ...]
    finish: Finish | None
    reason: str
    usage: tuple[int, int] | None
    unknown_reason: bool = False
    lost_log_probabilities: bool = False


def parse_response(content: bytes, *, max_tokens: int, charset: str | None = None) -> ParsedResponse:
    """Parse the body of a successful response. Raises `MalformedError`.

    max_tokens: requested length; a text of that length without a finish reason was cut off.
    charset: of the response's `Content-Type`.
    """
    document = read_document(content, charset)
    choice = find_choice(document)
    text, reasoned = read_text(choice)
    usage = read_usage(document)
    reason = read_reason(choice, document)
    problem = read_error(choice) or read_error(document)
    if problem is not None and not (text and reason and _finish_of(reason)):
        raise problem
    if not text and not reasoned and not reason and not has_content(choice):
        raise malformed("its choice has no message", document)
    log_probabilities = read_log_probabilities(choice.get("logprobs"))
    word, finish = normalise_reason(reason), _finish_of(reason)
    unknown = finish is None and not _is_refusal(word)
    if unknown or (finish == "stop" and word not in STOP_REASONS):
        # No finish reason, or an unknown one: the length shows whether the text was cut off.
        only_reasoned = reasoned and not text
        full = usage is not None and usage[1] >= max_tokens
        finish = "length" if full or only_reasoned else "stop"
    return ParsedResponse(
        # A lone surrogate is not valid Unicode and could not be written to a file.
        text=text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        log_probabilities=log_probabilities or (),
        finish=finish,
        reason=reason,
        usage=usage,
        unknown_reason=unknown,
        lost_log_probabilities=log_probabilities is None,
    )


def parse_usage(content: bytes) -> tuple[int, int] | None:
    """Return the prompt and completion tokens that a response reports, or None.

    It may be malformed otherwise.
    """
    try:
        return read_usage(read_document(content, None))
    except MalformedError:
        return None


def error_text(content: bytes, charset: str | None = None) -> str:
    """Return the message of an error response, neither redacted nor cut; empty where there is none."""
    text = decode(content, charset)
    try:
        return server_message(parse_json(text))
    except (ValueError, RecursionError):
        return text


def normalise_reason(reason: str) -> str:
    """Return a finish reason in lower case, without punctuation and prefixes."""
    word = "".join(letter for letter in reason.casefold() if letter.isalnum())
    return word.removeprefix("finishreason").removeprefix("stopreason")


def _finish_of(reason: str) -> Finish | None:
    """Translate a finish reason; None for an unknown one."""
    word = normalise_reason(reason)
    if word in LENGTH_REASONS:
        return "length"
    return "stop" if word in STOP_REASONS or not word or word in ("null", "none") else None


def _is_refusal(word: str) -> bool:
    return any(part in word for part in REFUSAL_REASONS)
