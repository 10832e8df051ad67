"""Read what servers that call themselves OpenAI-compatible answer: one text, why it ended, what it took."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from koine.generate.remote.retry import is_transient

Finish = Literal["stop", "length"]

MOST_TOKENS = 10**12
"""A count of tokens above this is none."""

# Other servers' words for the two ends of an answer, without case, signs and "FINISH_REASON_" in front of
# them.
STOPPED = frozenset((
    "stop", "stopped", "eos", "eostoken", "eostokenid", "endturn", "endofturn", "endoftext", "stopsequence", "stoptoken",
    "stopstring", "stopstr", "stopword", "complete", "completed", "finished", "end", "done", "normal", "success",
))  # fmt: skip
CUT = frozenset((
    "length", "lengthlimit", "maxtokens", "maxtoken", "maxlength", "maxlen", "maxnewtokens", "maxoutputtokens",
    "maxcompletiontokens", "modellength", "modelcontextwindowexceeded", "contextlength", "contextlengthexceeded",
    "tokenlimit", "outputlimit", "incomplete", "truncated", "limit", "errorlimit",
))  # fmt: skip
# Ends at which there is no answer to use, whatever text came before.
REFUSED = (
    "contentfilter", "filter", "safety", "recitation", "blocklist", "prohibited", "spii", "sensitive", "refusal",
    "moderation", "blocked", "error", "toxic", "abort", "cancel", "tool", "function", "fail", "timeout",
    "insufficient", "pauseturn", "language",
)  # fmt: skip

# Fields of an error that hold its message, or an object that does.
_MESSAGES = (
    "error", "message", "detail", "errors", "error_msg", "error_message", "msg", "status_msg", "base_resp",
)  # fmt: skip
_CHARSETS = re.compile(r"(iso|windows|cp|gb|big|shift|euc|koi|latin|utf|mac|us)[a-z0-9_-]*|ascii")


class MalformedError(Exception):
    """An answer that is none: no JSON, no choices, fields of another kind.

    kind: the same for answers that are malformed in the same way.
    said: the server's own words, not masked yet.
    passing: whether the server says that the failure may pass; None where it does not say.
    """

    def __init__(self, kind: str, *, said: str = "", passing: bool | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.said = said
        self.passing = passing


@dataclass(frozen=True, kw_only=True)
class ParsedResponse:
    """An answer as the endpoint gave it.

    log_probabilities: natural, of each token; empty where the endpoint gives none.
    finish: "stop" or "length"; None where `reason`, the endpoint's word for the end, says that this is no
    answer.
    usage: prompt tokens and completion tokens, or None where the endpoint does not say.
    strange_end: `reason` is no word that is known, and was taken for the answer's end.
    lost_log_probabilities: some were no finite numbers, and all are left out.
    """

    text: str
    log_probabilities: tuple[float, ...]
    finish: Finish | None
    reason: str
    usage: tuple[int, int] | None
    strange_end: bool = False
    lost_log_probabilities: bool = False


def parse_usage(content: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens that an answer reports, or None.

    Also of an answer that is otherwise malformed.
    """
    try:
        return _usage(_document(content, None))
    except MalformedError:
        return None


def parse_response(content: bytes, *, most_tokens: int, charset: str | None = None) -> ParsedResponse:
    """Read the body of a successful response. Raises `MalformedError`.

    most_tokens: the longest answer asked for; one of that length that gives no reason for its end was cut
    off.
    charset: of the response's `Content-Type`.
    """
    document = _document(content, charset)
    choice = _first_choice(document)
    text, thought = _text(choice)
    usage = _usage(document)
    reason = _reason(choice, document)
    problem = _error(choice) or _error(document)
    if problem is not None and not (text and reason and _finish(reason)):
        raise problem
    if not text and not thought and not reason and not _has_content(choice):
        raise _malformed("its choice has no message", document)
    log_probabilities = _log_probabilities(choice.get("logprobs"))
    word, finish = _word(reason), _finish(reason)
    strange = finish is None and not _is_refusal(word)
    if strange or (finish == "stop" and word not in STOPPED):
        # No word for the end, or one that is not known: the length tells whether it was cut off.
        only_thought = thought and not text
        full = usage is not None and usage[1] >= most_tokens
        finish = "length" if full or only_thought else "stop"
    return ParsedResponse(
        # A lone surrogate is no Unicode and could not be written to a file.
        text=text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        log_probabilities=log_probabilities or (),
        finish=finish,
        reason=reason,
        usage=usage,
        strange_end=strange,
        lost_log_probabilities=log_probabilities is None,
    )


def error_text(content: bytes, charset: str | None = None) -> str:
    """The server's own words in an error response; empty where there are none. Neither masked nor cut."""
    text = _decoded(content, charset)
    try:
        return _said(_parsed(text))
    except (ValueError, RecursionError):
        return text


# --- the document ---


def _document(content: bytes, charset: str | None) -> dict[str, Any]:
    """The JSON object of an answer; a streamed answer is put together to one."""
    text = _decoded(content, charset).strip()
    if not text:
        raise MalformedError("it is empty")
    try:
        value = _parsed(text)
    except (ValueError, RecursionError) as error:
        chunks = _chunks(text)
        if chunks is None:
            # Positions and excerpts differ from answer to answer; the kind is the same.
            name = str(error).partition(":")[0] if isinstance(error, json.JSONDecodeError) else str(error)
            raise MalformedError(f"it is no JSON ({name})", said=text) from None
        return _joined(chunks)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        raise MalformedError("it is no JSON object", said=text)
    return value


def _decoded(content: bytes, charset: str | None) -> str:
    """Decode a body: UTF-8 (or 16, 32), else the response's charset, else with replacements."""
    encodings: list[str] = [json.detect_encoding(content) if content[:4].count(0) else "utf-8"]
    if charset is not None and _CHARSETS.fullmatch(charset.strip().lower()):
        encodings.append(charset.strip())
    for encoding in encodings:
        try:
            return content.decode(encoding).lstrip("\ufeff")
        except (UnicodeError, LookupError):
            continue
    return content.decode("utf-8", "replace").lstrip("\ufeff")


def _parsed(text: str) -> Any:
    """Parse JSON with line breaks in its strings and numbers of any length.

    Raises `ValueError`, `RecursionError`.
    """

    def integer(digits: str) -> int | float:
        return int(digits) if len(digits) < 1000 else math.inf

    return json.loads(text, strict=False, parse_int=integer)


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "deeply nested JSON"


def _chunks(text: str) -> list[dict[str, Any]] | None:
    """The objects of a streamed answer; None where it is none.

    Server-sent events, or one object a line.
    """
    objects = []
    ended = False
    for line in text.splitlines():
        line = line.strip().removeprefix("\ufeff")
        name, colon, rest = line.partition(":")
        if not line or (colon and name in ("", "event", "id", "retry")):
            continue
        data = rest.strip() if name == "data" and colon else line
        if data == "[DONE]":
            ended = True
            continue
        try:
            value = _parsed(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        objects.append(value)
    if not objects:
        return None
    return [*objects, {"ended": True}] if ended else objects


def _joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer from the pieces of a streamed one. Raises `MalformedError` where it breaks off."""
    if len([chunk for chunk in chunks if "ended" not in chunk]) == 1:
        first = chunks[0]
        if not isinstance(_first(first.get("choices")), dict) or "delta" not in first["choices"][0]:
            return first  # a whole answer behind comments
    text, thought, reason, error, usage = "", "", "", None, None
    entries: list[Any] = []
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        error = chunk.get("error") or error
        choice = _first(chunk.get("choices"))
        if not isinstance(choice, dict):
            choice = chunk if "message" in chunk else {}
        piece, thinking = _text(choice)
        text, thought = text + piece, thought + ("x" if thinking else "")
        reason = _reason(choice, chunk) or reason
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
            entries += logprobs["content"]
    if not reason and not error and "ended" not in chunks[-1]:
        raise MalformedError("it is a stream that breaks off")
    message: dict[str, Any] = {"content": text, "reasoning_content": thought or None}
    choice = {
        "message": message,
        "finish_reason": reason,
        "logprobs": {"content": entries} if entries else None,
    }
    return {"choices": [choice], "usage": usage, "error": error}


# --- what it holds ---


def _first_choice(document: dict[str, Any]) -> dict[str, Any]:
    choice = _first(document.get("choices"))
    if isinstance(choice, dict):
        return choice
    if choice is None:
        # Without choices: Ollama's own form has one message, Anthropic's the parts of one.
        if isinstance(document.get("message"), dict | str) and not _failed(document):
            return document
        if isinstance(document.get("content"), list) and document.get("role") == "assistant":
            return {"message": document, "finish_reason": document.get("stop_reason")}
    problem = _error(document)
    raise problem if problem is not None else _malformed("it has no choices", document)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None


def _text(choice: Mapping[str, Any]) -> tuple[str, bool]:
    """The text of a choice, and whether the model thought.

    Raises `MalformedError` for content that is no text.
    """
    message = next(
        (choice[name] for name in ("message", "delta") if isinstance(choice.get(name), dict | str)), None
    )
    if isinstance(message, str):
        return message, False
    if message is None:
        text = choice.get("text")
        return (text if isinstance(text, str) else ""), False
    thought = any(message.get(name) for name in ("reasoning_content", "reasoning", "thinking", "thought"))
    text = _flat(message.get("content"))
    if not text:
        # `refusal` is OpenAI's field for "I will not"; some servers of completions fill `text` alone.
        for value in (message.get("refusal"), message.get("text"), choice.get("text")):
            if isinstance(value, str) and value:
                return value, thought
    return text, thought


def _flat(content: Any) -> str:
    """A message's content as one text.

    It comes as a text, in parts, or as null where the model only thought.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    if isinstance(content, dict):
        return _part(content)
    raise MalformedError("its content is no text", said=_dumped(content))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        if str(part.get("type", "text")) in ("reasoning", "thinking", "thought", "redacted_thinking"):
            return ""
        for name in ("text", "refusal", "content"):
            value = part.get(name)
            if isinstance(value, dict):
                value = value.get("value")
            if isinstance(value, str):
                return value
        if "type" in part:
            return ""  # a picture, a call of a tool
    raise MalformedError("its content is no text", said=_dumped(part))


def _has_content(choice: Mapping[str, Any]) -> bool:
    """Return whether the answer is there and empty, and not merely missing."""
    message = choice.get("message")
    if isinstance(message, dict):
        return "content" in message or "text" in message or "refusal" in message
    return isinstance(message, str) or isinstance(choice.get("text"), str)


def _reason(choice: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    for value in (choice.get("finish_reason"), choice.get("finishReason"), document.get("done_reason")):
        if isinstance(value, dict):
            value = value.get("type") or value.get("reason")
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def _word(reason: str) -> str:
    word = "".join(letter for letter in reason.casefold() if letter.isalnum())
    return word.removeprefix("finishreason").removeprefix("stopreason")


def _finish(reason: str) -> Finish | None:
    """Translate a server's finish reason; None for an unknown one."""
    word = _word(reason)
    if word in CUT:
        return "length"
    return "stop" if word in STOPPED or not word or word in ("null", "none") else None


def _is_refusal(word: str) -> bool:
    return any(part in word for part in REFUSED)


def _usage(document: Mapping[str, Any]) -> tuple[int, int] | None:
    usage = document.get("usage")
    if not isinstance(usage, dict):
        usage = document if "eval_count" in document else {}
    counts = []
    for names in (("prompt_tokens", "input_tokens", "prompt_eval_count"), ("completion_tokens", "output_tokens", "eval_count")):  # fmt: skip
        value = next((usage[name] for name in names if usage.get(name) is not None), None)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_TOKENS:
            return None
        counts.append(value)
    return counts[0], counts[1]


def _log_probabilities(value: Any) -> tuple[float, ...] | None:
    """One a token, empty where none are given, None where they are no finite numbers.

    Where one is null or minus infinity, none is kept: the others would stand at the wrong tokens.
    """
    if isinstance(value, dict):
        # `token_logprobs` is the layout of the older completions.
        found = value.get("content") if value.get("content") is not None else value.get("token_logprobs")
    else:
        found = value
    if found is None:
        return ()
    if not isinstance(found, list):
        return None
    numbers = []
    for entry in found:
        number = entry.get("logprob") if isinstance(entry, dict) else entry
        if isinstance(number, bool) or not isinstance(number, int | float):
            return None
        try:
            number = float(number)
        except OverflowError:
            return None
        if not math.isfinite(number):
            return None
        numbers.append(number)
    return tuple(numbers)


# --- errors inside a success ---


def _failed(document: Mapping[str, Any]) -> bool:
    return (
        bool(document.get("error")) or document.get("success") is False or document.get("object") == "error"
    )


def _error(document: Mapping[str, Any]) -> MalformedError | None:
    """The failure that a server tells inside a success, or None."""
    if not _failed(document):
        return None
    error = document.get("error")
    inner = error if isinstance(error, dict) else document
    code = next(
        (inner[name] for name in ("code", "status", "status_code") if inner.get(name) is not None), None
    )
    passing = None
    if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) == 3:
        code = int(code)
    if isinstance(code, int) and 400 <= code < 600:
        passing = is_transient(code)
    return MalformedError("it is an error", said=_said(document), passing=passing)


def _malformed(kind: str, document: Mapping[str, Any]) -> MalformedError:
    return MalformedError(kind, said=_said(document))


def _said(value: Any) -> str:
    """The message in an error; the whole of it where no field is known to hold one."""
    for _ in range(6):
        inner = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(inner, dict):
            break
        name = next((name for name in _MESSAGES if inner.get(name)), None)
        if name is None:
            break
        value = inner[name]
    if isinstance(value, str):
        return value
    return "" if value is None else _dumped(value)
