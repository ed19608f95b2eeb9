"""Transcripts: round trips, kills, what they hold, requests that were never recorded."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from probkit.errors import DataError
from probkit.models.language import Continuation, Law, MarkovLM, Prefix, RecordingLM, ReplayLM
from probkit.models.language.protocol import extended
from probkit.testing import LanguageModelConformance


def chain():
    return MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], end=0.1, symbols="a\n")


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


class TestRecordingLM(LanguageModelConformance):
    tolerance = 1e-12

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path):
        self.path = tmp_path / "run.jsonl"

    def model(self):
        return RecordingLM(chain(), self.path)


def run(lm, seed=0):
    """A run as particles make it: all kinds of calls, equal prefixes, stops, laws."""
    rng = stream(seed)
    prefixes = [lm.start("go")] * 4 + [lm.start([{"role": "user", "content": "é"}])]
    seen = [lm.capabilities, lm.vocabulary]
    for law, base in ((Law(), None), (Law(temperature=0.5, top_p=0.9), Law())):
        steps = lm.generate(prefixes, stop=["\n"], max_tokens=3, law=law, base=base, rng=rng)
        seen += [steps, lm.score(prefixes, steps), lm.next_log_probs(prefixes)]
        prefixes = [extended(p, s) for p, s in zip(prefixes, steps, strict=True)]
        prefixes = [prefixes[k] for k in torch.randint(5, (5,), generator=rng).tolist()]
    usage = lm.usage
    return seen + [rng.get_state(), usage]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_replay_is_the_recorded_run(tmp_path):
    path = tmp_path / "run.jsonl"
    recorded = run(RecordingLM(chain(), path))
    replay = ReplayLM(path)
    assert same(run(replay), recorded)
    assert replay.left == 0


def test_recording_changes_no_answer(tmp_path):
    """The model answers as it would alone on the stream that the transcript names."""
    path = tmp_path / "run.jsonl"
    lm = RecordingLM(chain(), path)
    steps = lm.generate([lm.start("go")] * 3, max_tokens=4, rng=stream())
    line = json.loads(path.read_text().splitlines()[-1])
    again = chain().generate([lm.start("go")] * 3, max_tokens=4, rng=stream(line["seed"]))
    assert again == steps


def test_the_same_request_is_answered_in_order_or_by_its_seed(tmp_path):
    path = tmp_path / "run.jsonl"
    lm = RecordingLM(chain(), path)
    prefixes = [lm.start("go")] * 3
    first = lm.generate(prefixes, max_tokens=5, rng=stream(1))
    second = lm.generate(prefixes, max_tokens=5, rng=stream(2))
    assert first != second
    by_seed, in_order = ReplayLM(path), ReplayLM(path)
    assert by_seed.generate(prefixes, max_tokens=5, rng=stream(2)) == second
    assert by_seed.generate(prefixes, max_tokens=5, rng=stream(1)) == first
    assert in_order.generate(prefixes, max_tokens=5, rng=stream(7)) == first
    assert in_order.generate(prefixes, max_tokens=5, rng=stream(8)) == second


def test_what_was_not_recorded_is_said(tmp_path):
    path = tmp_path / "run.jsonl"
    lm = RecordingLM(chain(), path)
    prefix = lm.start("go")
    lm.generate([prefix], max_tokens=5, rng=stream(1))
    replay = ReplayLM(path)
    with pytest.raises(DataError, match="the prompt 'stop' was not recorded in 'run.jsonl'"):
        replay.start("stop")
    with pytest.raises(DataError, match="no further answer to this request: generate of 1 pref"):
        replay.generate([prefix], max_tokens=6, rng=stream(1))
    with pytest.raises(DataError, match="ending in 'go'; 1 recorded calls are left"):
        replay.generate([prefix], max_tokens=5, law=Law(temperature=0.5), rng=stream(1))
    replay.generate([prefix], max_tokens=5, rng=stream(1))
    with pytest.raises(DataError, match="0 recorded calls are left"):
        replay.generate([prefix], max_tokens=5, rng=stream(1))
    with pytest.raises(DataError, match="next_log_probs of 1 prefixes"):
        replay.next_log_probs([prefix])
    with pytest.raises(DataError, match="the vocabulary was not recorded"):
        _ = replay.vocabulary


def test_the_transcript_can_be_read(tmp_path):
    path = tmp_path / "run.jsonl"
    run(RecordingLM(chain(), path))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["call"] for line in lines[:4]] == [
        "transcript",
        "prompt",
        "prompt",
        "vocabulary",
    ]
    assert lines[0]["model"] == "MarkovLM"
    assert lines[2]["prompt"] == [["user", "é"]] and "é" in path.read_text(encoding="utf-8")
    answers = next(line for line in lines if line["call"] == "generate")["answer"]
    assert set(answers[0]) == {"text", "tokens", "log_q", "log_p", "reason", "n_tokens"}


class _Keyed(MarkovLM):
    """A model that knows a secret."""

    def __init__(self):
        super().__init__([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]])
        self.api_key = "sk-secret"
        self.headers = {"Authorization": "Bearer sk-secret"}


def test_keys_never_reach_the_transcript(tmp_path):
    path = tmp_path / "run.jsonl"
    lm = RecordingLM(_Keyed(), path)
    lm.generate([lm.start("go")], max_tokens=2, rng=stream())
    assert "secret" not in path.read_text()


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path, cut):
    path = tmp_path / "run.jsonl"
    lm = RecordingLM(chain(), path)
    prefix = lm.start("go")
    first = lm.generate([prefix], max_tokens=5, rng=stream(1))
    whole = path.read_bytes()
    lm.generate([prefix], max_tokens=4, rng=stream(2))
    path.write_bytes(path.read_bytes()[:-cut])
    assert ReplayLM(path).left == 1
    again = RecordingLM(chain(), path)  # Recording goes on after the last whole line.
    assert path.read_bytes() == whole
    second = again.generate([prefix], max_tokens=4, rng=stream(2))
    replay = ReplayLM(path)
    assert replay.generate([prefix], max_tokens=5, rng=stream(1)) == first
    assert replay.generate([prefix], max_tokens=4, rng=stream(2)) == second


def test_failures_and_infinities_survive(tmp_path):
    def nothing(prefix):
        return torch.zeros(3, dtype=torch.bool)

    path = tmp_path / "run.jsonl"
    lm = RecordingLM(chain(), path)
    prefix = lm.start("go")
    law = Law(allowed=nothing)
    (failed,) = lm.generate([prefix], max_tokens=2, law=law, rng=stream())
    table = lm.next_log_probs([prefix])
    assert failed.reason == "failed" and failed.log_q == -math.inf
    replay = ReplayLM(path)
    assert replay.generate([prefix], max_tokens=2, law=law, rng=stream()) == [failed]
    assert torch.equal(replay.next_log_probs([prefix]), table) and table.isinf().any()


def test_prompts_that_were_not_started_here_are_recorded_too(tmp_path):
    path = tmp_path / "run.jsonl"
    lm = RecordingLM(chain(), path)
    prefix = Prefix("elsewhere", (), 0, "a")
    score = lm.score([prefix], [Continuation((0,), "a", 0.0, 0.0, "end", 2)])
    replay = ReplayLM(path)
    assert replay.start("elsewhere").prompt == "elsewhere"
    assert torch.equal(replay.score([prefix], [Continuation((0,), "a", 0, 0, "end", 2)]), score)


def test_threads_write_whole_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    lm = RecordingLM(chain(), path)
    prefix = lm.start("go")

    def call(seed):
        return lm.generate([prefix] * 5, max_tokens=20, rng=stream(seed))

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(call, range(24)))
    replay = ReplayLM(path)
    for seed in reversed(range(24)):
        again = replay.generate([prefix] * 5, max_tokens=20, rng=stream(seed))
        assert again == answers[seed]
    spent = sum(step.n_tokens for steps in answers for step in steps)
    assert replay.usage.completion_tokens == lm.usage.completion_tokens == spent


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    RecordingLM(chain(), path)
    with pytest.raises(DataError, match=r"was recorded with MarkovLM, not _Keyed"):
        RecordingLM(_Keyed(), path)
    with pytest.raises(DataError, match="transcript 'none.jsonl' cannot be read"):
        ReplayLM(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="'empty.jsonl' is empty"):
        ReplayLM(tmp_path / "empty.jsonl")
    (tmp_path / "other.jsonl").write_text('{"call": "other"}\n')
    with pytest.raises(DataError, match="is no transcript of format 1"):
        ReplayLM(tmp_path / "other.jsonl")
    lines = path.read_text() + "no json\n" + '{"call": "prompt"}\n'
    path.write_text(lines)
    with pytest.raises(DataError, match="'run.jsonl' is damaged in line 2"):
        ReplayLM(path)
