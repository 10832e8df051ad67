"""A malicious server that knows the key: the key shows nowhere, and memory and time are bounded."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from koine.errors import UserError
from koine.generate import Completion, RemoteEngine, Sampling
from koine.generate.remote.budget import Budget
from koine.generate.remote.redaction import Redactor, proxy_passwords, redact_logs
from koine.generate.remote.response_body import BodyError, _decompress
from koine.generate.remote.retry import RetryPolicy
from tests.generate.remote.hostile import SCRIPTS, answer, escaped

KEY = "sk-secret-0123456789"
TWICE = RetryPolicy(attempts=2, first_wait=0, longest_wait=0)
ANSWERED = {
    "strange finish", "answer", "answer in base64", "HTTP/1.0", "created", "chunked", "gzip", "two gzips", "said to be packed",
    "waiting lines", "blank lines", "UTF-16", "latin-1", "ill UTF-8",
}  # fmt: skip


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("hostile.py"))], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("THE_KEY", KEY)


def ask(root: str, script: str, **options: object) -> Completion:
    settings: dict[str, object] = {"retries": TWICE, "timeout": 20, "api_key_variable": "THE_KEY", **options}
    remote = RemoteEngine(f"{root}/v1", "m", **settings)  # type: ignore[arg-type]
    [completion] = remote.generate(
        [[{"role": "user", "content": script}]], Sampling(temperature=0, max_new_tokens=20)
    )
    return completion


def requests(root: str) -> int:
    return int(httpx2.get(f"{root}/count", trust_env=False).text)


def shows_key(text: str, size: int = 10) -> bool:
    """Whether any `size` letters of the key stand together, in the key's case or another."""
    lowered = text.lower()
    return any(KEY[place : place + size] in lowered for place in range(len(KEY) - size + 1))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "drip"])
def test_the_key_shows_nowhere(
    script: str, root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if script in ANSWERED:
            completion = ask(root, script, cache=tmp_path)
            told.append(completion.text)
            assert completion.finish == "stop"
        else:
            with pytest.raises(UserError) as raised:
                ask(root, script, cache=tmp_path)
            told += [str(raised.value), "".join(traceback.format_exception(raised.value))]
            assert len(str(raised.value)) < 900
            assert str(raised.value).isprintable()
    told += [str(warning.message) for warning in warned]
    told.append(caplog.text)
    told += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in told if shows_key(text)]
    assert "\\u0073" not in "".join(told)


@pytest.mark.parametrize("script", sorted(ANSWERED - {"answer", "answer in base64"}))
def test_features_of_good_servers_are_supported(script: str, root: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = ask(root, script).text
    assert text == {"latin-1": "Größe", "ill UTF-8": "Nine lam\ufffdps."}.get(script, "Nine lamps.")


def test_a_redirect_is_reported_and_not_followed(root: str) -> None:
    before = requests(root)
    with pytest.raises(UserError, match=r"HTTP 307; .* leads to: http://evil\.example/\*\*\*"):
        ask(root, "redirect")
    assert requests(root) == before + 1


# --- size and time ---


@pytest.mark.parametrize("script", ["endless", "bomb"])
def test_an_oversized_response_is_not_read_to_its_end(script: str, root: str) -> None:
    """4 MB and 2 KB a token: a gigabyte that unpacks or comes without end is left where it passes that."""
    before, paid = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, requests(root)
    budget = Budget(prompt_price=1, completion_price=1, ceiling=1)
    with pytest.raises(UserError, match="it is longer than 4,235,264 bytes; twice in the same way"):
        ask(root, script, budget=budget, retries=RetryPolicy(attempts=6, first_wait=0, longest_wait=0))
    assert requests(root) == paid + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_slow_drip_ends_at_the_time_out(root: str) -> None:
    with pytest.raises(UserError, match=r"no answer within 0\.3 s"):
        ask(root, "drip", timeout=0.3)


@pytest.mark.parametrize("encodings", ["gzip", "gzip, gzip", "deflate", "deflate, gzip", "x-gzip"])
def test_compressed_bodies(encodings: str) -> None:
    import gzip
    import zlib

    body = answer()
    packed = body
    for name in encodings.split(", "):
        packed = zlib.compress(packed) if name == "deflate" else gzip.compress(packed)
    assert _decompress(packed, encodings, 10_000) == body
    with pytest.raises(BodyError, match="longer than 50 bytes"):
        _decompress(packed, encodings, 50)
    with pytest.raises(BodyError, match=r"breaks off|cannot be unpacked"):
        _decompress(packed[:-1], encodings, 10_000)
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    assert _decompress(raw.compress(body) + raw.flush(), "deflate", 10_000) == body


# --- the mask ---


@pytest.mark.parametrize(
    "spelled",
    [
        KEY,
        KEY.upper(),
        KEY[::-1],
        escaped(KEY),
        escaped(KEY).replace("\\", "\\\\"),
        "".join(f"%{ord(letter):02x}" for letter in KEY),
        "".join(f"%25{ord(letter):02x}" for letter in KEY),
        "".join(f"&#{ord(letter)};" for letter in KEY),
        "".join(f"\\x{ord(letter):02x}" for letter in KEY),
        "".join(chr(ord(letter) + 0xFEE0) for letter in KEY),
        KEY.encode().hex(" "),
        "\u200b".join(KEY),
        '", "'.join(KEY),
        "\\n".join(KEY),
    ],
)
def test_spellings(spelled: str) -> None:
    redactor = Redactor([KEY])
    for text in (f"before {spelled} after", spelled):
        for masked in (redactor.text(text), redactor.completion(text), redactor.line(text)):
            assert "***" in masked
            assert len(masked) <= len("before  after") + 7, masked
    assert redactor.line(f"before {spelled} after").startswith("before *")


@pytest.mark.parametrize("place", range(6))
def test_base64_at_every_alignment(place: int) -> None:
    import base64

    for form in (base64.b64encode, base64.urlsafe_b64encode, base64.b32encode):
        coded = form(b"x" * place + KEY.encode() + b"yz").decode()
        masked = Redactor([KEY]).completion(coded)
        assert "***" in masked
        assert len(masked) < len(coded) - 16


def test_a_placeholder_for_a_key_stays_in_completions() -> None:
    """Servers without keys are given one of these; an answer may use the word."""
    for word in ("EMPTY", "none", "ollama", "not-needed", "x", ""):
        redactor = Redactor([word])
        assert (
            redactor.completion(f"An empty room: {word} is not needed.")
            == f"An empty room: {word} is not needed."
        )
    assert Redactor(["EMPTY"]).line("key EMPTY") == "key ***"
    assert Redactor(["x"]).line("an example") == "an example"


def test_a_line_is_text() -> None:
    assert Redactor().line("\x1b[31ma\r\nb\u202ec\x00 \x9bd\u2028e") == "[31ma b c d e"
    assert Redactor().line("x" * 1000) == "x" * 300 + "..."
    assert Redactor([KEY]).line("x" * 295 + KEY) == "x" * 295 + "***"


def test_only_the_start_of_a_huge_body_is_searched() -> None:
    redactor = Redactor([KEY])
    assert redactor.line("a " * 10_000_000) == "a " * 150 + "..."
    for cut in range(1, len(KEY)):
        assert not shows_key(redactor.line(" " * ((1 << 16) - cut) + KEY), 3)


def test_long_texts_are_masked_in_linear_time() -> None:
    """Two million characters that are nearly the key; quadratic time would take days."""
    redactor = Redactor([KEY])
    assert redactor.text(KEY[:-1].replace("e", "x") * 100_000)
    assert redactor.completion((KEY[:-1] + "\\") * 50_000)


def test_the_log_filter_is_removed() -> None:
    logger = logging.getLogger("httpx2")
    before = list(logger.filters)
    with redact_logs(Redactor([KEY])):
        assert len(logger.filters) == len(before) + 1
    assert logger.filters == before


# --- where else a key may stand ---


def test_passwords_of_proxies_are_masked(monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:pass%2Dword-77@127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    assert set(proxy_passwords()) == {"pass%2Dword-77", "pass-word-77"}
    with pytest.raises(UserError) as raised:
        ask("http://nowhere.example", "answer")
    assert "word-77" not in str(raised.value)
    monkeypatch.setenv("HTTP_PROXY", "http://me:pass%2Dword-77@[::1")
    with pytest.raises(UserError, match="HTTP_PROXY") as raised:
        ask(root, "answer")
    assert "word-77" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "address",
    [f"http://{KEY}@host/v1", f"http://host/v1?key={KEY}", f"http://host/v1#{KEY}", f"http://a:{KEY}@ho st", f"http://host/{KEY}/v1"],
)  # fmt: skip
def test_an_address_that_holds_the_key_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(UserError) as raised:
        RemoteEngine(address, "m", api_key_variable="THE_KEY")
    assert not shows_key("".join(traceback.format_exception(raised.value)))


def test_the_key_in_place_of_its_variable_the_model_or_a_message() -> None:
    for variable in (KEY, "AIzaSy0123456789abcdefABCDEF0123456789"):
        with pytest.raises(UserError, match="api_key_variable is no name") as raised:
            RemoteEngine("http://host/v1", "m", api_key_variable=variable)
        assert variable not in str(raised.value)
    with pytest.raises(UserError, match="the model's name holds the key") as raised:
        RemoteEngine("http://host/v1", f"m-{KEY}", api_key_variable="THE_KEY")
    assert not shows_key(str(raised.value))
    remote = RemoteEngine("http://host/v1", "m", api_key_variable="THE_KEY")
    with pytest.raises(UserError, match="conversation 1 holds the key"):
        remote.generate([[{"role": "user", "content": f"Is {KEY} mine?"}]], Sampling())
    assert not shows_key(repr(vars(remote)["_headers"]) + repr(vars(remote)["_runner"]))


def test_engines_in_threads_mask_their_own_keys(
    root: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OTHER_KEY", "sk-other-abcdefgh12")

    def refused(variable: str) -> None:
        with pytest.raises(UserError):
            ask(root, "status line", api_key_variable=variable)

    threads = [threading.Thread(target=refused, args=(name,)) for name in ("THE_KEY", "OTHER_KEY")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not shows_key(caplog.text)
    assert "abcdefgh" not in caplog.text
