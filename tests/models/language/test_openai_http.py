"""Parts of the HTTP back end: retries, budget, keys, event loop, schema, transport."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import pickle
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fault_proxy import FaultProxy, Faults
from support.http_server import HttpServer, Request, json_response, response
from support.openai_server import OpenAIServer, Variant, chain

from probkit.errors import CapabilityError, DataError
from probkit.files import pack, unpack
from probkit.models import OpenAILM
from probkit.models.language import Budget, Prices, Retries
from probkit.models.language.http.ledger import Ledger, OverBudgetError, Plan, PromptEstimate
from probkit.models.language.http.loop import BackgroundLoop
from probkit.models.language.http.probe import Probe
from probkit.models.language.http.profile import Endpoint
from probkit.models.language.http.requests import Ask
from probkit.models.language.http.retry import retry_after
from probkit.models.language.http.schema import (
    Answer,
    MalformedError,
    Piece,
    parse_chat,
    parse_completion,
    parse_llama,
)
from probkit.models.language.http.secret import Secret
from probkit.models.language.http.steps import _rest
from probkit.models.language.protocol import Usage

QUICK = Retries(most=4, first=0.005, longest=0.01)
KEY = "sk-canary-5f1e0c7d"


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def server():
    with OpenAIServer(Variant()) as made:
        yield made


@pytest.fixture(scope="module")
def profile(server):
    with OpenAILM(f"{server.url}/v1", api_key_env=None) as lm:
        found = lm.profile
    # the scripted answers below hold no log probabilities
    return replace(found, raw=replace(found.raw, logprobs=False))


def model_of(server: HttpServer, **options) -> OpenAILM:
    return OpenAILM(f"{server.url}/v1", **{"api_key_env": None, "retries": QUICK} | options)


# ------------------------------------------------------------------------ retries


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-4", 0.0), ("soon", 0.0), ("", 0.0), ("nan", 0.0), ("inf", 0.0)],
)
def test_retry_after_in_seconds(value, seconds):
    assert retry_after({"retry-after": value}) == seconds


def test_retry_after_as_a_date():
    noon = "Fri, 20 Nov 2026 12:00:00 GMT"
    at = 1795176000.0
    assert retry_after({"retry-after": noon}, now=at - 7.5) == 7.5
    assert retry_after({"retry-after": noon}, now=at + 7.5) == 0.0
    assert retry_after({}) == 0.0


def test_jitter_is_full_and_capped():
    retries = Retries(first=1.0, longest=4.0)
    for repeat, ceiling in ((1, 1.0), (2, 2.0), (3, 4.0), (9, 4.0), (5000, 4.0)):
        waits = [retries.pause(repeat) for _ in range(200)]
        assert 0.0 <= min(waits) < 0.1 * ceiling and 0.9 * ceiling < max(waits) <= ceiling
    assert retries.pause(1, asked=7.0) == 7.0


class Scripted(HttpServer):
    """Answers by a list of functions, then by the last one."""

    def __init__(self, *answers) -> None:
        super().__init__()
        self.answers, self.times = list(answers), []

    async def handle(self, request: Request, writer) -> None:
        self.times.append(time.monotonic())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        writer.write(answer)


def good(text: str = "ab") -> bytes:
    usage = {"prompt_tokens": 2, "completion_tokens": len(text)}
    choice = {"index": 0, "text": text, "finish_reason": "length"}
    return json_response(200, {"choices": [choice], "usage": usage})


def test_the_servers_wait_is_honoured(profile):
    busy = response(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.3"})
    with Scripted(busy, good()) as scripted, model_of(scripted, profile=profile) as lm:
        assert lm.generate([lm.start("x|")], max_tokens=2, rng=stream())[0].text == "ab"
        assert scripted.times[1] - scripted.times[0] >= 0.3
        assert (lm.usage.calls, lm.usage.retries, lm.usage.failures) == (1, 1, 0)


def test_one_wait_holds_all_requests_back(profile):
    busy = response(429, b"{}", {"Retry-After": "0.3"})
    options = dict(profile=profile, concurrency=1)
    with Scripted(busy, good()) as scripted, model_of(scripted, **options) as lm:
        steps = lm.generate([lm.start("x|")] * 3, max_tokens=2, rng=stream())
        assert [s.text for s in steps] == ["ab"] * 3
        assert min(scripted.times[1:]) - scripted.times[0] >= 0.3


def test_a_wait_longer_than_the_deadline_fails_at_once(profile):
    busy = response(429, b"{}", {"Retry-After": "3600"})
    with Scripted(busy) as scripted, model_of(scripted, profile=profile, deadline=30.0) as lm:
        begun = time.monotonic()
        assert lm.generate([lm.start("x|")], max_tokens=2, rng=stream())[0].reason == "failed"
        assert time.monotonic() - begun < 20 and len(scripted.times) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_troubles_are_tried_again(profile, status):
    with Scripted(response(status, b"busy"), good()) as s, model_of(s, profile=profile) as lm:
        assert lm.generate([lm.start("x|")], max_tokens=2, rng=stream())[0].text == "ab"
        assert lm.usage.retries == 1


def test_a_spent_account_is_not_tried_again(profile):
    body = b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
    with Scripted(good(), response(429, body)) as s, model_of(s, profile=profile) as lm:
        lm.generate([lm.start("x|")], max_tokens=2, rng=stream())
        assert lm.generate([lm.start("x|")], max_tokens=2, rng=stream())[0].reason == "failed"
        assert len(s.times) == 2 and lm.usage.failures == 1


def test_repeats_end(profile):
    with Scripted(response(500, b"")) as s, model_of(s, profile=profile) as lm:
        assert lm.generate([lm.start("x|")], max_tokens=2, rng=stream())[0].reason == "failed"
        assert len(s.times) == 1 + QUICK.most
        assert (lm.usage.retries, lm.usage.failures) == (QUICK.most, 1)


def test_redirects_are_not_followed(profile, server, monkeypatch):
    monkeypatch.setenv("PROBKIT_TEST_KEY", KEY)
    away = response(307, b"", {"Location": f"{server.url}/v1/completions"})
    with Scripted(good(), away) as s, model_of(s, profile=profile, api_key_env=None) as lm:
        lm.generate([lm.start("x|")], max_tokens=2, rng=stream())
        before = len(server.headers)
        assert lm.generate([lm.start("x|")], max_tokens=2, rng=stream())[0].reason == "failed"
        assert len(server.headers) == before


# ------------------------------------------------------------------------ time


def test_slow_answers_are_cut_off(profile, server):
    slow = FaultProxy(server.url, Faults(slow=1.0), delay=5.0)
    options = dict(timeout=0.2, retries=Retries(most=1, first=0.0), profile=profile)
    with slow as proxy, model_of(proxy, **options) as lm:
        begun = time.monotonic()
        steps = lm.generate([lm.start("x|")] * 4, max_tokens=2, rng=stream())
        assert [s.reason for s in steps] == ["failed"] * 4
        assert time.monotonic() - begun < 4


def test_the_deadline_of_a_call_holds(profile, server):
    slow = FaultProxy(server.url, Faults(slow=1.0), delay=8.0)
    with slow as proxy, model_of(proxy, profile=profile, deadline=0.3) as lm:
        begun = time.monotonic()
        steps = lm.generate([lm.start("x|")] * 3, max_tokens=2, rng=stream())
        assert [s.reason for s in steps] == ["failed"] * 3
        assert time.monotonic() - begun < 4
        assert 0.2 < lm.usage.seconds < 4
        # what was under way may have been computed, so it counts
        assert lm.usage.completion_tokens >= 3 * 2


def test_the_budget_of_seconds(profile, server):
    with model_of(server, profile=profile, budget=Budget(seconds=0.0)) as lm:
        assert lm.generate([lm.start("x|")], max_tokens=2, rng=stream())[0].reason == "budget"
    slow = FaultProxy(server.url, Faults(slow=1.0), delay=8.0)
    with slow as p, model_of(p, profile=profile, budget=Budget(seconds=0.3)) as lm:
        assert lm.generate([lm.start("x|")], max_tokens=2, rng=stream())[0].reason == "budget"


def test_concurrency_is_bounded(profile, server):
    server.delay, server.most_busy = 0.02, 0
    try:
        with model_of(server, profile=profile, concurrency=3) as lm:
            lm.generate([lm.start("x|")] * 12, max_tokens=1, rng=stream())
        assert server.most_busy == 3
    finally:
        server.delay = 0.0


def test_an_interrupt_cancels_what_is_under_way(profile, server):
    """Ctrl-C while requests are out: it is raised at once, and nothing stays reserved."""
    slow = FaultProxy(server.url, Faults(slow=1.0), delay=20.0)
    with slow as proxy, model_of(proxy, profile=profile, concurrency=2) as lm:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            lm.generate([lm.start("x|")] * 6, max_tokens=2, rng=stream())
        assert time.monotonic() - begun < 8
        assert not lm._ledger._reserved
        assert lm.usage.failures >= 2
        proxy.faults = Faults()  # and the model goes on
        assert lm.generate([lm.start("x|")], max_tokens=2, rng=stream())[0].text


# ------------------------------------------------------------------------ the loop


def test_works_inside_a_running_loop(profile, server):
    with model_of(server, profile=profile) as lm:

        async def cell():
            return lm.generate([lm.start("x|")], max_tokens=2, rng=stream())

        assert asyncio.run(cell())[0].text


def test_works_from_many_threads(profile, server):
    with model_of(server, profile=profile) as lm:
        found = {}

        def work(k):
            found[k] = lm.generate([lm.start("x|")] * 2, max_tokens=3, rng=stream(k))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert found[2] == lm.generate([lm.start("x|")] * 2, max_tokens=3, rng=stream(2))
        assert lm.usage.calls == 10


def test_closes_cleanly_and_opens_again(profile, server):
    before = threading.active_count()
    lm = model_of(server, profile=profile)
    first = lm.generate([lm.start("x|")], max_tokens=3, rng=stream())
    assert threading.active_count() == before + 1
    lm.close()
    lm.close()
    assert threading.active_count() == before
    assert lm.generate([lm.start("x|")], max_tokens=3, rng=stream()) == first
    assert lm.usage.calls == 2
    del lm  # the finalizer ends the thread too
    assert threading.active_count() == before


def test_a_forked_child_says_so():
    loop = BackgroundLoop()

    async def one():
        return 1

    assert loop.run(one) == 1
    loop._process += 1  # what a child sees
    with pytest.raises(CapabilityError, match="forked child.*make a new OpenAILM"):
        loop.run(one)
    loop.stop()  # and does not touch the parent's thread
    loop._process -= 1
    loop._started()
    loop.stop()


# ------------------------------------------------------------------------ the ledger


def test_prices():
    prices = Prices(prompt=2.0, completion=10.0, cached=0.5)
    assert prices.of(1_000_000, 400_000, 100_000) == pytest.approx(1.2 + 0.2 + 1.0)
    assert Prices(prompt=2.0).of(1_000_000, 400_000, 0) == pytest.approx(2.0)


def test_money_is_counted_and_limited(profile, server):
    prices = Prices(prompt=1000.0, completion=5000.0)
    with model_of(server, profile=profile, prices=prices, budget=Budget(money=0.1)) as lm:
        seen = [lm.generate([lm.start("x|")], max_tokens=4, rng=stream(k))[0] for k in range(12)]
        used = lm.usage
        assert used.money == pytest.approx(
            (1000 * used.prompt_tokens + 5000 * used.completion_tokens) / 1e6
        )
        assert used.money <= 0.1 and seen[-1].reason == "budget" and seen[0].reason != "budget"
        assert "in money" in lm.report()


def run_ledger(work):
    return asyncio.run(work())


def test_reservations_wait_for_answers_under_way():
    async def work():
        ledger = Ledger(Budget(completion_tokens=10), Prices())
        first = await ledger.admit(Plan(1, 8))
        second = asyncio.create_task(ledger.admit(Plan(1, 8)))
        await asyncio.sleep(0.01)
        assert not second.done()
        ledger.settle(first, Usage(prompt_tokens=1, completion_tokens=2))
        ticket = await second
        ledger.lost(ticket)
        assert ledger.usage.completion_tokens == 2 + 8
        with pytest.raises(OverBudgetError, match="completion_tokens: 10 of 10 used"):
            await ledger.admit(Plan(1, 1))
        assert (ledger.usage.calls, ledger.usage.retries) == (2, 0)

    run_ledger(work)


def test_repeats_count_as_requests_of_the_budget():
    async def work():
        ledger = Ledger(Budget(calls=2), Prices())
        ledger.lost(await ledger.admit(Plan(1, 1)))
        ledger.lost(await ledger.admit(Plan(1, 1), repeat=True))
        with pytest.raises(OverBudgetError):
            await ledger.admit(Plan(1, 1), repeat=True)

    run_ledger(work)


@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(0, 60),
    requests=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_no_order_of_answers_passes_a_limit(limit, requests, order):
    """Requests of real cost up to their plan, answered in any order, some lost."""

    async def work():
        ledger = Ledger(Budget(tokens=limit), Prices())

        async def one(prompt, completion, lost):
            try:
                ticket = await ledger.admit(Plan(prompt, completion))
            except OverBudgetError:
                return
            for _ in range(order.randint(0, 3)):
                await asyncio.sleep(0)
            held = ledger.usage + sum(ledger._reserved.values(), Usage())
            assert held.tokens <= limit
            if lost:
                ledger.lost(ticket)
            else:
                done = order.randint(0, completion)
                ledger.settle(ticket, Usage(prompt_tokens=prompt, completion_tokens=done))

        await asyncio.gather(*(one(*each) for each in requests))
        assert ledger.usage.tokens <= limit and not ledger._reserved

    run_ledger(work)


def test_estimates_of_prompts_learn():
    estimate = PromptEstimate()
    assert estimate.tokens(100) >= 100  # no tokenizer needs more than a token a byte
    estimate.learn(100, 30)
    assert 30 <= estimate.tokens(100) < 60
    estimate.learn(100, 45)
    assert estimate.tokens(100) >= 45
    estimate.learn(4, 25)  # a chat template
    assert estimate.tokens(100) >= 45 + 25


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("budget", [Budget(tokens=90), Budget(completion_tokens=17)])
def test_budgets_hold_before_requests_are_sent(profile, server, budget, concurrency):
    before = server.tokens, server.completion_tokens
    with model_of(server, profile=profile, budget=budget, concurrency=concurrency) as lm:
        steps = lm.generate([lm.start("x|")] * 30, max_tokens=5, rng=stream())
        spent = server.tokens - before[0], server.completion_tokens - before[1]
        assert spent == (lm.usage.tokens, lm.usage.completion_tokens)
        limit = budget.tokens or budget.completion_tokens
        assert spent[0 if budget.tokens else 1] <= limit
        reasons = [step.reason for step in steps]
        assert reasons.count("budget") >= 10 and reasons[0] != "budget"
        assert steps[-1].reason == "budget" and steps[-1].n_tokens == 0
        assert lm.usage.calls == sum(reason != "budget" for reason in reasons)
        # which requests are stopped does not depend on how fast answers come
        with model_of(server, profile=profile, budget=budget, concurrency=3) as other:
            again = other.generate([other.start("x|")] * 30, max_tokens=5, rng=stream())
        assert [s.reason for s in again] == reasons


def test_probing_needs_a_budget_too(server):
    with (
        model_of(server, budget=Budget(calls=3)) as lm,
        pytest.raises(
            DataError, match=r"budget does not pay for probing .*calls: 3 of 3 used.*profile="
        ),
    ):
        _ = lm.capabilities


# ------------------------------------------------------------------------ first contact


def test_nothing_there():
    lm = OpenAILM("http://127.0.0.1:9/v1", "m", api_key_env=None, retries=QUICK)
    with pytest.raises(DataError, match="expected a server at http://127.0.0.1:9/v1.*no connec"):
        _ = lm.capabilities
    lm.close()


def test_a_wrong_path(server):
    lm = OpenAILM(f"{server.url}/api/v9", "markov", api_key_env=None, retries=QUICK)
    with pytest.raises(DataError, match="neither from /completions nor from /chat/completions"):
        lm.start("x")
    lm.close()


def test_an_unknown_model(server):
    with (
        model_of(server, model="gpt-99") as lm,
        pytest.raises(
            DataError, match=r"expected a model that .* lists \('markov'\), got 'gpt-99'.*HTTP 404"
        ),
    ):
        lm.start("x")


def test_refusals_without_probing_are_errors_too(server, profile):
    wrong = OpenAILM(f"{server.url}/v9", "m", api_key_env=None, profile=profile, retries=QUICK)
    with pytest.raises(DataError, match="neither from /completions"):
        wrong.generate([wrong.start("x")], max_tokens=2, rng=stream())
    wrong.close()


def test_models_must_be_named_where_there_are_several():
    listed = json_response(200, {"data": [{"id": "a"}, {"id": "b"}]})
    with (
        Scripted(listed) as scripted,
        model_of(scripted) as lm,
        pytest.raises(DataError, match=r"expected model= .*lists 2 models \('a', 'b'\); name one"),
    ):
        lm.start("x")


# ------------------------------------------------------------------------ keys


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch, tmp_path, caplog, capfd):
    """Everything that can be looked at is searched for a canary."""
    monkeypatch.setenv("PROBKIT_TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    with OpenAIServer(Variant(key=KEY)) as server:
        lm = OpenAILM(f"{server.url}/v1", api_key_env="PROBKIT_TEST_KEY", retries=QUICK)
        with lm:
            steps = lm.generate([lm.start("x|")] * 3, max_tokens=3, rng=stream())
            assert server.headers[-1]["authorization"] == f"Bearer {KEY}"
            seen += [repr(lm), str(lm), lm.report(), repr(steps), repr(lm.__dict__)]
            seen += [repr(vars(lm._client)), repr(vars(lm._client._transport))]
            seen.append(repr(lm._client._transport._client.headers))
            seen += [repr(pack(lm)), pickle.dumps(lm).decode("latin-1")]
            server.with_variant(key="another")  # it repeats the key that it was sent
            step = lm.generate([lm.start("x|")], max_tokens=3, rng=stream())
            assert step[0].reason == "failed"
            copy = pickle.loads(pickle.dumps(lm))
            with copy, pytest.raises(DataError, match="refused the API key") as caught:
                copy.start("x|")
            error: BaseException | None = caught.value
            while error is not None:
                seen += [str(error), repr(error), repr(error.__dict__)]
                error = error.__cause__ or error.__context__
            assert "PROBKIT_TEST_KEY" in str(caught.value) and "[api key]" in str(caught.value)
    seen += [caplog.text, *capfd.readouterr()]
    assert "Incorrect API key provided" in "".join(seen)
    assert not [text for text in seen if KEY in text]


def test_a_key_in_an_answer_is_blotted_out(monkeypatch, profile):
    monkeypatch.setenv("PROBKIT_TEST_KEY", KEY)
    options = dict(profile=profile, api_key_env="PROBKIT_TEST_KEY")
    with Scripted(good(f"a {KEY} b")) as scripted, model_of(scripted, **options) as lm:
        step = lm.generate([lm.start("x|")], max_tokens=20, rng=stream())[0]
        assert step.text == "a [api key] b"


def test_without_the_variable_no_key_is_sent(monkeypatch, server, profile):
    monkeypatch.delenv("PROBKIT_TEST_KEY", raising=False)
    with model_of(server, profile=profile, api_key_env="PROBKIT_TEST_KEY") as lm:
        lm.generate([lm.start("x|")], max_tokens=1, rng=stream())
    assert "authorization" not in server.headers[-1]


def test_a_broken_key_is_an_error(monkeypatch):
    monkeypatch.setenv("PROBKIT_TEST_KEY", f"{KEY} with spaces")
    with pytest.raises(DataError, match="printable ASCII") as caught:
        Secret("PROBKIT_TEST_KEY")
    assert KEY not in str(caught.value)


def test_stored_without_runtime(server, profile):
    lm = model_of(server, budget=Budget(tokens=9), prices=Prices(1.0), profile=profile)
    lm.generate([lm.start("x|")], max_tokens=1, rng=stream())
    for copy in (unpack(*pack(lm)), pickle.loads(pickle.dumps(lm))):
        assert repr(copy) == repr(lm) and copy.budget == lm.budget
        assert copy.usage == Usage() and copy.retries == QUICK and copy.profile == profile
    lm.close()


# ------------------------------------------------------------------------ schema


def completion(**changes) -> bytes:
    choice = {"index": 0, "text": "ab", "finish_reason": "length"} | changes
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 2}}).encode()


def test_a_plain_completion():
    answer = parse_completion(completion())
    assert (answer.text, answer.finish, answer.completion_tokens) == ("ab", "length", 2)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b'"text"',
        b"\xff",
        b"[" * 100_000,
        b'{"error": {"message": "busy"}}',
        b'{"choices": []}',
        b'{"choices": [7]}',
        completion(text=None),
        completion(text=7),
        completion(finish_reason=None),
        completion(finish_reason="content_filter"),
        completion(logprobs=[1]),
        completion(logprobs={"tokens": ["a"], "token_logprobs": [-1.0, -2.0]}),
        completion(logprobs={"tokens": ["a"], "token_logprobs": ["-1"]}),
        completion(logprobs={"tokens": ["a"], "token_logprobs": [0.7]}),
        completion(logprobs={"tokens": ["a"], "token_logprobs": [True]}),
        completion(logprobs={"content": [{"token": "a"}]}),
        completion(logprobs={"content": [{"token": "a", "logprob": -1.0, "bytes": [999]}]}),
        completion(token_ids=["1"]),
        b'{"choices": [{"text": "a", "finish_reason": "length"}], "usage": 7}',
        b'{"choices": [{"text": "a", "finish_reason": "length"}], "usage": {"prompt_tokens": -1}}',
    ],
)
def test_other_answers_are_malformed(body):
    with pytest.raises(MalformedError):
        parse_completion(body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "choices",
                        "text",
                        "message",
                        "content",
                        "finish_reason",
                        "logprobs",
                        "usage",
                        "tokens",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_json_breaks_the_parsers(value):
    body = json.dumps(value).encode()
    for parse in (parse_completion, parse_chat, parse_llama):
        for content in (body, b"data: " + body + b"\n\n"):
            try:
                answer = parse(content)
            except MalformedError:
                continue
            assert isinstance(answer.text, str) and answer.finish in (
                "stop",
                "end",
                "either",
                "length",
            )


def test_a_stream_of_llama_cpp():
    chunks = [
        {
            "content": "a",
            "tokens": [5],
            "stop": False,
            "completion_probabilities": [
                {"id": 5, "token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}
            ],
        },
        {
            "content": "",
            "tokens": [9],
            "stop": False,
            "completion_probabilities": [
                {"id": 9, "token": "", "bytes": [], "logprob": -0.25, "top_logprobs": []}
            ],
        },
        {
            "content": "",
            "tokens": [],
            "stop": True,
            "stop_type": "word",
            "stopping_word": "\n",
            "tokens_predicted": 2,
            "tokens_evaluated": 4,
            "timings": {"cache_n": 3},
        },
    ]
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    answer = parse_llama(body)
    assert (answer.text, answer.finish, answer.stop, answer.ids) == ("a", "stop", "\n", (5, 9))
    assert math.fsum(p.log_prob for p in answer.pieces) == -0.75
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (4, 3, 2)
    with pytest.raises(MalformedError, match="breaks off"):
        parse_llama(body[: body.index(b'"stop": true')].rpartition(b"data: ")[0])


@pytest.mark.parametrize(
    ("token", "stop", "rest"),
    [
        ("\n\n", "\n", "\n"),
        ("b. A", "a b.", " A"),
        ("\n", "\n", ""),
        ("x", "\n", ""),
        ("ab", "ab", ""),
    ],
)
def test_what_follows_a_stop_string_inside_its_token(token, stop, rest):
    assert _rest(token, stop) == rest


def test_a_chain_that_cannot_be_told_apart_is_no_prefill():
    """A server whose answers look alike wherever they begin: nothing is claimed."""
    from probkit.models.language import MarkovLM

    monotone = MarkovLM([1.0, 0.0, 0.0, 0.0], [[1.0, 0.0, 0.0, 0.0]] * 4, symbols=chain().symbols)
    with OpenAIServer(Variant(completions=False, chat="fresh"), monotone) as server:
        with model_of(server) as lm:
            assert not lm.capabilities.prefill
            assert not lm.capabilities.seed  # all texts are equal: seeds cannot be seen to work


# ------------------------------------------------------------------------------- probing


@pytest.mark.parametrize(
    ("second", "law"), [(-1.2, "raw"), (-0.9, "scaled"), (None, "unknown")], ids=str
)
def test_a_drawn_answer_without_tokens_does_not_hide_how_log_probs_are_told(second, law):
    """Of two answers the first ends before its first token; a server that never tells is known."""

    def told(value):
        return Answer("x", "length", pieces=(Piece(b"x", 1, value, {"x": value}),))

    answers = {1.0: told(-1.2), 2.0: None if second is None else told(second)}
    asked = []

    async def ask(end, question):
        asked.append(question.temperature)
        empty = asked.count(question.temperature) == 1 or answers[question.temperature] is None
        return Answer("", "stop") if empty else answers[question.temperature]

    probe = Probe("http://server/v1", "http://server", None, None, ask, None)
    assert asyncio.run(probe._law(Endpoint("completions"), Ask("one two"))) == law
    assert 3 < len(asked) < 8
