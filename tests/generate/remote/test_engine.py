"""The remote engine against a real server in another process, which fails in many ways."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest

from koine.errors import KoineWarning, UserError
from koine.generate import RemoteEngine, Sampling
from koine.generate.messages import Message
from koine.generate.remote.budget import Budget
from koine.generate.remote.rate_limit import RateLimits
from koine.generate.remote.responses import error_text
from koine.generate.remote.retry import RetryPolicy

GREEDY = Sampling(temperature=0, max_new_tokens=50)
KEY = "sk-secret-0123456789"


class Endpoint:
    """The server process, seen from the test."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("endpoint.py"))], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.root = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.url = f"{self.root}/v1"

    def control(self, **orders: Any) -> None:
        httpx2.post(f"{self.root}/control", json=orders, trust_env=False).raise_for_status()

    def plan(self, **plans: list[dict[str, Any]]) -> None:
        self.control(plans=plans)

    def seen(self) -> dict[str, Any]:
        return dict(httpx2.get(f"{self.root}/seen", trust_env=False).json())

    def bodies(self) -> list[dict[str, Any]]:
        return [request["body"] for request in self.seen()["requests"]]

    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies()]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    started = Endpoint()
    yield started
    started.close()


@pytest.fixture
def endpoint(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """The server, with everything forgotten."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server.control(reset=True)
    return server


@pytest.fixture
def fake() -> FakeTime:
    return FakeTime()


def spoken(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def asked(*questions: str) -> list[list[Message]]:
    return [[{"role": "user", "content": question}] for question in questions]


def engine(endpoint: Endpoint, fake: FakeTime | None = None, **options: Any) -> RemoteEngine:
    """An engine that waits for nothing."""
    time_source = fake or FakeTime()
    return RemoteEngine(
        endpoint.url, options.pop("model", "m"), sleep=time_source.sleep, clock=time_source.clock, **options
    )


def texts(remote: RemoteEngine, *questions: str, sampling: Sampling = GREEDY) -> list[str]:
    return [completion.text for completion in remote.generate(asked(*questions), sampling)]


# --- the contract ---


def test_completions_come_in_order_with_their_log_probabilities(endpoint: Endpoint) -> None:
    endpoint.plan(
        b=[{"finish": "length"}], c=[{"logprobs": None}], d=[{"content": None}], e=[{"usage": None}]
    )
    completions = engine(endpoint).generate(asked("a", "b", "c", "d", "e"), GREEDY)
    assert [completion.text for completion in completions] == [
        "a|None|1",
        "b|None|1",
        "c|None|1",
        "",
        "e|None|1",
    ]
    assert [completion.finish for completion in completions] == ["stop", "length", "stop", "stop", "stop"]
    assert completions[0].log_probabilities == (-0.5,) * len("a|None|1")
    assert completions[2].log_probabilities == ()
    assert completions[0].tokens == ()
    assert [completion.prompt_tokens for completion in completions] == [10, 10, 10, 10, 0]
    assert engine(endpoint).generate([], GREEDY) == []


def test_settings_are_sent_as_the_endpoint_names_them(endpoint: Endpoint) -> None:
    settings = Sampling(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.5, seed=3, max_new_tokens=9
    )
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "ü"}]
    remote = engine(endpoint, concurrency=1)
    remote.generate([conversation, conversation], settings)
    plain = engine(endpoint, log_probabilities=False, length_field="max_completion_tokens")
    plain.generate(asked("p"), Sampling(temperature=0, seed=3))
    first, second, third = endpoint.bodies()
    assert first == {
        "model": "m",
        "messages": conversation,
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 3,
        "logprobs": True,
    }
    assert second == first | {"seed": 4}
    # what changes nothing is left out: endpoints refuse names that they do not know
    assert third == {
        "model": "m",
        "messages": [{"role": "user", "content": "p"}],
        "max_completion_tokens": 256,
        "temperature": 0,
    }


def test_it_works_where_an_event_loop_is_running(endpoint: Endpoint) -> None:
    async def notebook() -> list[str]:
        return texts(engine(endpoint), "a")

    assert asyncio.run(notebook()) == ["a|None|1"]


def test_concurrency_is_reached_and_never_exceeded(endpoint: Endpoint) -> None:
    names = [str(number) for number in range(12)]
    # each of the first three answers only once three are there together
    endpoint.plan(**{name: [{"meet": 3}] for name in names})
    texts(engine(endpoint, concurrency=3), *names)
    assert endpoint.seen()["most_at_once"] == 3


# --- failures that may pass ---

PASSING: dict[str, dict[str, Any]] = {
    "busy": {"status": 429},
    "timeout": {"status": 408},
    "conflict": {"status": 409},
    "early": {"status": 425},
    "error": {"status": 500, "body": "oh no"},
    "gateway": {"status": 502},
    "overloaded": {"status": 529},
    "drop": {"drop": True},
    "cut": {"cut": True},
    "error-inside": {"body": '{"error": {"message": "overloaded", "code": 503}}'},
}
MALFORMED: dict[str, dict[str, Any]] = {
    "html": {"body": "<html>"},
    "number": {"body": "3"},
    "empty": {"body": '{"choices": []}'},
    "nothing": {"body": ""},
    "null-choice": {"body": '{"choices": [null]}'},
    "no-message": {"body": '{"choices": [{}]}'},
    "not-text": {"content": 5},
    "deep": {"body": "[" * 100_000},
    "error-inside": {"body": '{"error": "it broke"}'},
    "broken-stream": {"body": 'data: {"choices": [{"delta": {"content": "Ni"}}]}\n\n'},
    "packed": {"body": "x", "headers": {"Content-Encoding": "br"}},
    "no-gzip": {"body": "x", "headers": {"Content-Encoding": "gzip"}},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_response_is_retried_once(name: str, endpoint: Endpoint, fake: FakeTime) -> None:
    endpoint.plan(q=[MALFORMED[name]], r=[MALFORMED[name]] * 9)
    assert texts(engine(endpoint, fake), "q") == ["q|None|2"]
    with pytest.raises(UserError, match="no answer after 2 attempts .*malformed.*twice in the same way"):
        texts(engine(endpoint, fake), "r")
    assert endpoint.questions() == ["q", "q", "r", "r"]


@pytest.mark.parametrize("name", PASSING)
def test_a_transient_failure_is_retried(name: str, endpoint: Endpoint, fake: FakeTime) -> None:
    endpoint.plan(q=[PASSING[name], PASSING[name]])
    assert texts(engine(endpoint, fake), "q") == ["q|None|3"]
    first, second = fake.slept
    assert 0.5 <= first <= 1.0
    assert 1.0 <= second <= 2.0


def test_a_time_out_is_retried(endpoint: Endpoint, fake: FakeTime) -> None:
    endpoint.plan(q=[{"hang": True}])
    assert texts(engine(endpoint, fake, timeout=0.3), "q") == ["q|None|2"]
    assert len(fake.slept) == 1


def test_an_absent_server_is_given_up_after_all_attempts(fake: FakeTime) -> None:
    gone = Endpoint()
    gone.close()
    remote = engine(gone, fake, retries=RetryPolicy(attempts=3))
    with pytest.raises(UserError, match=r"conversation 1: no answer after 3 attempts \(ConnectError"):
        texts(remote, "q")
    assert len(fake.slept) == 2


def test_retry_after_is_respected(endpoint: Endpoint, fake: FakeTime) -> None:
    endpoint.plan(q=[{"status": 429, "headers": {"Retry-After": "7"}}])
    assert texts(engine(endpoint, fake), "q") == ["q|None|2"]
    assert sum(fake.slept) >= 7


def test_a_retry_after_that_is_too_long_is_given_up(endpoint: Endpoint, fake: FakeTime) -> None:
    endpoint.plan(
        q=[{"status": 429, "headers": {"Retry-After": "3600"}, "body": '{"error": {"message": "quota"}}'}]
    )
    with pytest.raises(UserError, match=r"after 1 attempt \(HTTP 429: quota; it asks to come back in 3600 s"):
        texts(engine(endpoint, fake), "q")
    assert fake.slept == []


def test_the_same_seed_gives_the_same_waits(endpoint: Endpoint) -> None:
    waits = []
    for seed in (0, 0, 1):
        fake = FakeTime()
        endpoint.plan(q=[{"status": 500}] * 4)
        texts(engine(endpoint, fake, retries=RetryPolicy(seed=seed)), "q")
        waits.append(fake.slept)
    assert waits[0] == waits[1]
    assert waits[0] != waits[2]


# --- failures that stay ---


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 418, 422])
def test_a_permanent_error_is_reported_at_once_with_the_servers_message(
    status: int, endpoint: Endpoint, fake: FakeTime
) -> None:
    endpoint.plan(q=[{"status": status, "body": '{"error": {"message": "because\\nI say so"}}'}])
    with pytest.raises(UserError, match=f"conversation 1: HTTP {status}: because I say so"):
        texts(engine(endpoint, fake), "q")
    assert endpoint.questions() == ["q"]
    assert fake.slept == []


def test_a_completion_that_ended_for_another_reason_is_an_error(endpoint: Endpoint) -> None:
    endpoint.plan(b=[{"finish": "content_filter"}])
    with pytest.raises(
        UserError, match="conversation 2: the endpoint ended the answer with 'content_filter'"
    ):
        texts(engine(endpoint), "a", "b")


def test_after_a_failure_completions_are_kept_and_only_the_missing_are_paid(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # b is refused while a is under way; a's answer still comes in, c is never sent
    endpoint.plan(a=[{"hang": True}], b=[{"status": 400}])

    def refused(content: bytes, charset: str | None) -> str:
        endpoint.control(release=True)
        return error_text(content, charset)

    monkeypatch.setattr("koine.generate.remote.call_runner.error_text", refused)
    with pytest.raises(UserError, match="conversation 2"):
        texts(engine(endpoint, cache=tmp_path, concurrency=2), "a", "b", "c")
    assert sorted(endpoint.questions()) == ["a", "b"]
    assert texts(engine(endpoint, cache=tmp_path), "a", "b", "c") == ["a|None|1", "b|None|2", "c|None|1"]
    assert sorted(endpoint.questions()) == ["a", "b", "b", "c"]


def test_a_failure_does_not_wait_for_calls_that_are_pausing(endpoint: Endpoint) -> None:
    # b is refused once a is pausing
    endpoint.plan(a=[{"status": 500}], b=[{"hang": True, "status": 400}])

    async def forever(_: float) -> None:
        await asyncio.to_thread(endpoint.control, release=True)
        await asyncio.Event().wait()

    remote = RemoteEngine(endpoint.url, "m", sleep=forever)
    with pytest.raises(UserError, match="conversation 2"):
        texts(remote, "a", "b")


# --- the key ---


def test_the_key_is_sent_and_shows_nowhere(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint.control(key=KEY)
    monkeypatch.setenv("THE_KEY", KEY + "\n")
    remote = engine(endpoint, api_key_variable="THE_KEY", cache=tmp_path, budget=budget("1"))
    assert texts(remote, "q") == ["q|None|1"]
    wrong = KEY + "x"
    monkeypatch.setenv("THE_KEY", wrong)
    with pytest.raises(
        UserError, match=r"HTTP 401: Incorrect .* Bearer \*\*\*; check the key in THE_KEY"
    ) as raised:
        texts(engine(endpoint, api_key_variable="THE_KEY"), "r")
    with pytest.raises(UserError, match="HTTP 401"):
        texts(engine(endpoint), "s")
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in kept
    assert KEY not in caplog.text
    assert KEY not in str(raised.value) + repr(remote)


@pytest.mark.parametrize(
    ("value", "says"), [("", "is not set"), ("a b", "holds no key"), ("schlüssel", "holds no key")]
)
def test_an_invalid_key_is_refused(value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(UserError, match=f"THE_KEY {says}") as raised:
        RemoteEngine("http://127.0.0.1:1/v1", "m", api_key_variable="THE_KEY")
    assert not value or value not in str(raised.value)


# --- the cache ---


def test_a_cached_completion_is_not_requested_again(endpoint: Endpoint, tmp_path: Path) -> None:
    first = engine(endpoint, cache=tmp_path).generate(asked("a", "b"), GREEDY)
    again = engine(endpoint, cache=tmp_path).generate(asked("b", "a"), GREEDY)
    assert again == first[::-1]
    assert len(endpoint.questions()) == 2


def test_another_model_setting_or_text_is_another_request(endpoint: Endpoint, tmp_path: Path) -> None:
    texts(engine(endpoint, cache=tmp_path), "a")
    texts(engine(endpoint, cache=tmp_path, model="other"), "a")
    texts(engine(endpoint, cache=tmp_path), "a ")
    texts(engine(endpoint, cache=tmp_path), "a", sampling=Sampling(temperature=0, max_new_tokens=51))
    assert len(endpoint.questions()) == 4


def test_the_order_of_a_schemas_keys_is_part_of_the_request(endpoint: Endpoint, tmp_path: Path) -> None:
    """It is the order in which an answer's keys are written; the same order again is the same question."""
    for names in (("a", "b"), ("b", "a"), ("a", "b")):
        schema = {"type": "object", "properties": {name: {"type": "null"} for name in names}}
        sampling = Sampling(temperature=0, json_schema=schema)
        texts(engine(endpoint, cache=tmp_path), "a", sampling=sampling)
    assert len(endpoint.questions()) == 2


def test_samples_with_and_without_a_seed(endpoint: Endpoint, tmp_path: Path) -> None:
    """Greedy: one question however often it stands there. With a seed: one a place. Without: one a draw."""
    assert texts(engine(endpoint, cache=tmp_path), "g", "g") == ["g|None|1"] * 2
    seeded, free = Sampling(seed=5), Sampling()
    remote = engine(endpoint, cache=tmp_path, concurrency=1)
    assert texts(remote, "s", "s", sampling=seeded) == ["s|5|1", "s|6|2"]
    assert texts(remote, "f", "f", sampling=free) == ["f|None|1", "f|None|2"]
    before = len(endpoint.questions())
    assert before == 5
    # a re-run is free, in another order too, and one draw more is one call
    assert texts(remote, "s", "s", sampling=seeded) == ["s|5|1", "s|6|2"]
    assert texts(remote, "n", "f", "f", "f", sampling=free) == [
        "n|None|1",
        "f|None|1",
        "f|None|2",
        "f|None|3",
    ]
    assert endpoint.questions()[before:] == ["n", "f"]


def with_answer(entry: str, **changes: Any) -> bytes:
    """The entry with other fields in its answer, and the right hash for them."""
    value = json.loads(entry)
    value["answer"].update(changes)
    text = json.dumps(value["answer"], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return json.dumps(value | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


@pytest.mark.parametrize(
    "damage",
    ["cut", "empty", "text", "moved", "bytes", "kind", "number", "deep", "nan", "types", "surrogate"],
)
def test_a_damaged_cache_entry_is_detected_and_requested_again(
    damage: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    texts(engine(endpoint, cache=tmp_path), "q", "other")
    entries = {
        json.loads(path.read_text())["request"]["body"]["messages"][0]["content"]: path
        for path in tmp_path.glob("answers/*/*.json")
    }
    entry = entries["q"]
    whole = entry.read_text()
    entry.write_bytes(
        {
            "cut": whole[: len(whole) // 2].encode(),
            "empty": b"",
            "text": whole.replace("q|None|1", "q|None|9").encode(),
            "moved": entries["other"].read_bytes(),
            "bytes": b"\xff" + whole.encode(),
            "kind": b"[]",
            "number": b"1" * 5000,
            "deep": b"[" * 100_000,
            "nan": whole.replace('"temperature": 0', '"temperature": NaN').encode(),
            "types": with_answer(whole, prompt_tokens="10"),
            "surrogate": whole.replace('"role": "user"', '"role": "\\ud800"').encode(),
        }[damage]
    )
    remote = engine(endpoint, cache=tmp_path)
    with pytest.warns(KoineWarning, match="damaged answer in the cache"):
        assert texts(remote, "q", "other") == ["q|None|2", "other|None|1"]
    assert texts(remote, "q") == ["q|None|2"]


# --- two at one cache ---

ASK = """
import sys
from pathlib import Path
from koine.generate import RemoteEngine, Sampling
url, cache, *questions = sys.argv[1:]
remote = RemoteEngine(url, "m", cache=Path(cache), concurrency=2)
answers = remote.generate(
    [[{"role": "user", "content": text}] for text in questions], Sampling(temperature=0, max_new_tokens=50)
)
print([answer.text for answer in answers])
"""


def start_asking(endpoint: Endpoint, cache: Path, *questions: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ASK, endpoint.url, str(cache), *questions], stdout=subprocess.PIPE, text=True
    )


def wait_for(endpoint: Endpoint, question: str) -> None:
    while question not in endpoint.questions():
        time.sleep(0.02)


def test_two_processes_on_one_cache_pay_once(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan(a=[{"hang": True}])
    with start_asking(endpoint, tmp_path, "a", "b", "c") as other:
        wait_for(endpoint, "a")
        with ThreadPoolExecutor(1) as pool:
            ours = pool.submit(texts, engine(endpoint, cache=tmp_path), "c", "b", "a")
            while endpoint.questions().count("c") + endpoint.questions().count("b") < 2:
                time.sleep(0.02)
            # both wait for a, which one of them has asked for
            time.sleep(0.3)
            endpoint.control(release=True)
            assert ours.result(60) == ["c|None|1", "b|None|1", "a|None|1"]
        assert other.communicate(timeout=60)[0].strip() == "['a|None|1', 'b|None|1', 'c|None|1']"
    assert sorted(endpoint.questions()) == ["a", "b", "c"]
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_request_lock_ends_with_its_process(endpoint: Endpoint, tmp_path: Path) -> None:
    """The operating system gives it back when a process is killed; no clock is asked."""
    endpoint.plan(a=[{"hang": True}])
    with start_asking(endpoint, tmp_path, "a") as other:
        wait_for(endpoint, "a")
        other.kill()
        other.communicate()
    assert texts(engine(endpoint, cache=tmp_path), "a") == ["a|None|2"]
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_waiting_process_sends_the_request_where_the_other_fails(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.plan(a=[{"hang": True, "status": 400}])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(texts, engine(endpoint, cache=tmp_path), "a")
        wait_for(endpoint, "a")
        second = pool.submit(texts, engine(endpoint, cache=tmp_path), "a")
        time.sleep(0.3)
        endpoint.control(release=True)
        with pytest.raises(UserError, match="HTTP 400"):
            first.result(60)
        assert second.result(60) == ["a|None|2"]


# --- a disk that takes nothing more ---


def full(monkeypatch: pytest.MonkeyPatch, *names: str, free_after: int = 1000) -> None:
    """Let writing files with one of `names` in their path fail as on a full disk, `free_after` times."""
    from koine import files
    from koine.files import writing

    write, failed = writing.write_atomically, [0]

    def refuse(path: Path, content: bytes | str) -> None:
        if any(name in str(path) for name in names) and failed[0] < free_after:
            failed[0] += 1
            with files.disk_errors(path):
                raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(writing, "write_atomically", refuse)


def test_a_completion_is_returned_though_it_cannot_be_written(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = engine(endpoint, cache=tmp_path, budget=budget("10"))
    full(monkeypatch, "answers", free_after=1)
    with pytest.warns(
        KoineWarning, match="the disk is full; 1 paid answer could not be kept, and will be requested"
    ):
        assert texts(remote, "a") == ["a|None|1"]
    # the same engine keeps it as soon as there is room
    assert texts(remote, "a") == ["a|None|1"]
    assert texts(engine(endpoint, cache=tmp_path), "a") == ["a|None|1"]
    assert endpoint.questions() == ["a"]


def test_a_completion_is_returned_though_its_price_cannot_be_written(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call stays in the ledger at its worst."""
    from koine.generate.remote.budget import Ledger

    def settle(*_: Any, **__: Any) -> None:
        raise UserError("the disk is full", where="ledger.json")

    monkeypatch.setattr(Ledger, "settle", settle)
    remote = engine(endpoint, cache=tmp_path, budget=budget("10"))
    with pytest.warns(KoineWarning, match="ledger.json: the disk is full$"):
        assert texts(remote, "a") == ["a|None|1"]
    assert remote.spending().at_most == WORST  # type: ignore[union-attr]


def test_a_full_disk_starts_no_other_call(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, "answers")
    remote = engine(endpoint, cache=tmp_path, concurrency=1)
    with pytest.raises(UserError, match="the disk is full; 1 paid answer could not be kept; free some space"):
        texts(remote, "a", "b")
    assert endpoint.questions() == ["a"]


def test_no_call_is_sent_where_the_ledger_cannot_be_written(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, "ledger")
    with pytest.raises(UserError, match="ledger.json: the disk is full"):
        texts(engine(endpoint, cache=tmp_path, budget=budget("10")), "a")
    assert endpoint.questions() == []


@pytest.mark.parametrize("name", ["", "answers", "claims"])
def test_a_file_where_the_cache_must_go(name: str, endpoint: Endpoint, tmp_path: Path) -> None:
    place = tmp_path / "cache" / name
    place.parent.mkdir(exist_ok=True)
    place.write_text("x")
    with pytest.raises(UserError, match="a file stands where a folder must go"):
        texts(engine(endpoint, cache=tmp_path / "cache", budget=budget("10")), "a")
    assert endpoint.questions() == []


def test_a_cache_entry_of_a_later_koine_is_not_paid_again(endpoint: Endpoint, tmp_path: Path) -> None:
    texts(engine(endpoint, cache=tmp_path), "q")
    [entry] = tmp_path.glob("answers/*/*.json")
    entry.write_text(entry.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="an answer of version 2, and this Koine reads version 1"):
        texts(engine(endpoint, cache=tmp_path), "q")
    assert endpoint.questions() == ["q"]
    entry.unlink()
    entry.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        texts(engine(endpoint, cache=tmp_path), "q")


# --- money ---


def budget(ceiling: str, *, prompt: str = "1000", completion: str = "10000") -> Budget:
    """Prices for a million: 0.001 for a token of a prompt, 0.01 for one of an answer.

    An answer takes 10 and 5.
    """
    return Budget(prompt_price=prompt, completion_price=completion, ceiling=ceiling)


WORST = (1 + len("user") + 16 + 64) * Decimal("0.001") + 50 * Decimal("0.01")
"""Of a question of one letter."""
REAL = 10 * Decimal("0.001") + 5 * Decimal("0.01")


def test_a_call_that_might_pass_the_ceiling_is_never_sent(endpoint: Endpoint, tmp_path: Path) -> None:
    dear = engine(endpoint, cache=tmp_path, budget=budget(str(WORST - Decimal("0.001"))))
    with pytest.raises(UserError, match=r"conversation 1: it may cost 0\.585, .* ceiling of 0\.584"):
        texts(dear, "a")
    assert endpoint.questions() == []
    assert dear.spending().at_most == 0  # type: ignore[union-attr]
    assert texts(engine(endpoint, cache=tmp_path, budget=budget(str(WORST))), "a") == ["a|None|1"]


def test_reported_tokens_are_counted_and_a_restart_continues(endpoint: Endpoint, tmp_path: Path) -> None:
    # room for the worst case of one more call after three real ones, not after four
    ceiling = str(WORST + 3 * REAL)
    for question in "abc":
        remote = engine(endpoint, cache=tmp_path, budget=budget(ceiling))
        texts(remote, question)
    spending = remote.spending()
    assert spending is not None
    assert spending.spent == 3 * REAL
    assert spending.unsettled == 0
    assert (spending.calls, spending.prompt_tokens, spending.completion_tokens) == (3, 30, 15)
    texts(engine(endpoint, cache=tmp_path, budget=budget(ceiling)), "d")
    with pytest.raises(UserError, match="would pass the ceiling"):
        texts(engine(endpoint, cache=tmp_path, budget=budget(ceiling)), "e")
    # what is in the cache costs nothing
    assert texts(engine(endpoint, cache=tmp_path, budget=budget(ceiling)), *"abcd")
    assert endpoint.questions() == list("abcd")


def test_calls_wait_for_the_costs_that_others_have_reserved(endpoint: Endpoint) -> None:
    """The ceiling has room for one worst case at a time and for all real prices together."""
    remote = engine(endpoint, budget=budget(str(WORST + 5 * REAL)), concurrency=4)
    assert len(texts(remote, *"abcdef")) == 6
    assert endpoint.seen()["most_at_once"] == 1


@pytest.mark.parametrize(
    ("step", "unsettled"),
    [
        ({"drop": True}, WORST),
        ({"cut": True}, WORST),
        ({"body": "<html>"}, WORST),
        ({"status": 500}, Decimal(0)),
        ({"status": 429}, Decimal(0)),
        # of something that did not wait for the model, which may have answered
        ({"status": 502}, WORST),
        ({"status": 504}, WORST),
        ({"status": 408}, WORST),
        ({"status": 524}, WORST),
        ({"body": '{"error": "it broke"}'}, WORST),
        # no use, but its tokens are told
        ({"content": 5}, REAL),
    ],
    ids=str,
)
def test_calls_without_a_response_are_counted_at_their_worst_case(
    step: dict[str, Any], unsettled: Decimal, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.plan(q=[step])
    remote = engine(endpoint, cache=tmp_path, budget=budget("10"))
    texts(remote, "q")
    spending = remote.spending()
    assert spending is not None
    assert spending.at_most == unsettled + REAL


def test_a_refused_call_costs_nothing(endpoint: Endpoint) -> None:
    endpoint.plan(q=[{"status": 400}])
    remote = engine(endpoint, budget=budget("10"))
    with pytest.raises(UserError):
        texts(remote, "q")
    assert remote.spending().at_most == 0  # type: ignore[union-attr]


def test_a_response_without_usage_is_counted_at_its_worst_case(endpoint: Endpoint) -> None:
    endpoint.plan(q=[{"usage": None}])
    remote = engine(endpoint, budget=budget("10"))
    with pytest.warns(KoineWarning, match="1 answers .* do not say how many tokens"):
        texts(remote, "q")
    assert remote.spending().at_most == WORST  # type: ignore[union-attr]


def test_engines_in_many_threads_share_a_ledger(endpoint: Endpoint, tmp_path: Path) -> None:
    def ask(number: int) -> None:
        texts(engine(endpoint, cache=tmp_path, budget=budget("1000")), f"{number}a", f"{number}b")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))
    spending = engine(endpoint, cache=tmp_path, budget=budget("1000")).spending()
    assert spending is not None
    assert (spending.calls, spending.spent, spending.unsettled) == (12, 12 * REAL, 0)


def test_the_estimate_is_what_the_calls_may_take(endpoint: Endpoint, tmp_path: Path) -> None:
    remote = engine(endpoint, cache=tmp_path, budget=budget("10"))
    texts(remote, "a")
    estimate = remote.estimate(asked("a", "b", "c", "c"), GREEDY)
    assert (estimate.calls, estimate.cached) == (2, 1)
    assert (estimate.prompt_tokens, estimate.completion_tokens) == (2 * 85, 100)
    assert estimate.cost == 2 * WORST
    assert estimate.described() == (
        "2 calls (1 answers are in the cache), at most 170 tokens of prompts and 100 of answers, a cost of 1.17"
    )
    assert endpoint.questions() == ["a"]
    assert engine(endpoint).estimate(asked("a"), GREEDY).cost is None


# --- pace ---


def test_requests_stay_within_the_rate_limit(endpoint: Endpoint, fake: FakeTime) -> None:
    remote = engine(endpoint, fake, limits=RateLimits(requests_per_minute=2), concurrency=1)
    texts(remote, *"abcde")
    # two at once, two a minute later, one after another minute
    assert fake.slept == [60.0, 60.0]


def test_tokens_stay_within_the_rate_limit_and_reported_counts_replace_bounds(
    endpoint: Endpoint, fake: FakeTime
) -> None:
    # a worst case is 135 tokens, a real one 15: the next fits as long as 135 are free
    remote = engine(endpoint, fake, limits=RateLimits(tokens_per_minute=135 + 30), concurrency=1)
    texts(remote, *"abcd")
    assert fake.slept == [60.0]


# --- Ctrl-C ---


def test_an_interrupt_ends_the_calls_and_keeps_completions(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan(slow=[{"hang": True}])
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from koine.generate import RemoteEngine, Sampling
        from koine.generate.remote.budget import Budget
        remote = RemoteEngine("{endpoint.url}", "m", cache=Path({str(tmp_path)!r}), concurrency=1, timeout=1000,
            budget=Budget(prompt_price=1000, completion_price=10000, ceiling=100))
        questions = [[{{"role": "user", "content": text}}] for text in ("quick", "slow", "never")]
        remote.generate(questions, Sampling(temperature=0, max_new_tokens=50))
        """
    )
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        while "slow" not in endpoint.questions():
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGINT)
        _, error = child.communicate(timeout=60)
    finally:
        child.kill()
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert endpoint.questions() == ["quick", "slow"]
    remote = engine(endpoint, cache=tmp_path, budget=budget("100"))
    spending = remote.spending()
    assert spending is not None
    # the answer that was under way may have been charged for
    assert (spending.spent, spending.unsettled) == (REAL, WORST + 3 * Decimal("0.001"))
    assert texts(remote, "quick") == ["quick|None|1"]
    assert endpoint.questions() == ["quick", "slow"]


# --- options ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_url": "127.0.0.1:8000"}, "the address"),
        ({"base_url": "ftp://host/v1"}, "the address 'ftp://host/v1' is none"),
        ({"base_url": "http://"}, "the address"),
        ({"base_url": "http://user:secret@host/v1"}, "holds a user, a password"),
        ({"model": ""}, "no model is named"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": True}, "timeout is True"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"timeout": "5"}, "timeout is '5'"),
        ({"concurrency": 2.5}, "concurrency is 2.5"),
        ({"concurrency": True}, "concurrency is True"),
        ({"model": 5}, "no model is named"),
        ({"length_field": "max"}, "length_field is 'max'"),
        ({"base_url": "http://host:99999999/v1"}, "the address"),
        ({"base_url": "http://host:0/v1"}, "the address"),
        ({"base_url": "http://a..b/v1"}, "the address"),
        ({"base_url": f"http://{'a' * 64}.example/v1"}, "the address"),
        ({"base_url": "http://\ud800/v1"}, "the address"),
        ({"base_url": "http://host\n/v1"}, "the address"),
        ({"base_url": None}, "the address is no text"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    given = {"base_url": "http://host/v1", "model": "m"} | options
    with pytest.raises(UserError, match=says) as raised:
        RemoteEngine(given.pop("base_url"), given.pop("model"), **given)
    assert "secret" not in str(raised.value)


def test_text_that_is_no_unicode_cannot_be_sent(endpoint: Endpoint) -> None:
    with pytest.raises(UserError, match="conversation 2 cannot be sent"):
        texts(engine(endpoint), "a", "\ud800")
    assert endpoint.questions() == []


def test_incomplete_characters_become_replacement_characters(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.plan(q=[{"body": json.dumps(spoken("a\ud800b😀"))}])
    assert texts(engine(endpoint, cache=tmp_path), "q") == ["a\ufffdb😀"]
    assert texts(engine(endpoint, cache=tmp_path), "q") == ["a\ufffdb😀"]
