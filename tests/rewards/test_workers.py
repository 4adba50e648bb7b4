"""Rewards in worker processes: the same values, and what hangs, dies or fails there."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from frugalpath.errors import InputError
from frugalpath.rewards import workers
from frugalpath.rewards.calling import Rows
from frugalpath.rewards.registry import RewardError, RewardTimeout, WorkerError, get_reward, get_rewards

ROOT = Path(__file__).parents[2]
SOURCE = """
    import os
    import re
    import sys
    import time

    LOADED = []

    class Odd(Exception):
        def __init__(self, code, reason):  # cannot be read again from its pickle
            super().__init__(f"{code}: {reason}")

    def length(completions, answer, scale=1, **columns):
        rows = zip(completions, answer, columns["budget"], strict=True)
        return [None if a is None else scale * len(c) + a + b for c, a, b in rows]

    def pid(completions):
        return [os.getpid()] * len(completions)

    def other_pid(completions):
        return [os.getpid()] * len(completions)

    def imported(completions):
        return [float("torch" in sys.modules or "pytest" in sys.modules)] * len(completions)

    def received(completions, log_metric_=None, **columns):
        raise ValueError(sorted(columns))

    def pictures(completions, prompts, image):
        told = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        return [i.size[0] if p in ("?", told) else 0 for p, i in zip(prompts, image, strict=True)]

    async def wait(completions):
        return [1.0] * len(completions)

    def do(completions, deed):
        for d in deed:
            if d == "loop":
                while True:
                    pass
            if d == "sleep":
                time.sleep(60)
            if d == "regular expression":
                re.match("(a+)+b", "a" * 60)
            if d == "sum":  # takes no signals
                sum(range(10**12))
            if d == "exit":
                os._exit(3)
            if d == "fail":
                {}["case"]
            if d == "odd":
                raise Odd(429, "too many")
            if d == "text":
                return ["1"] * len(completions)
        return [None if d == "none" else len(c) for c, d in zip(completions, deed, strict=True)]
"""
TEXTS = ["a" * i for i in range(7)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of the user's; its workers are kept for all tests."""
    path = tmp_path_factory.mktemp("rewards") / "slow.py"
    path.write_text(textwrap.dedent(SOURCE))
    yield path
    workers.stop()


@pytest.fixture
def make(path):
    """A reward of the file in two workers."""

    def make(function, **spec):
        return get_reward({"name": f"{path}:{function}", "workers": 2, **spec})

    return make


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_values_are_those_of_the_process_in_order(make, n):
    columns = {
        "answer": [None if i % 3 == 2 else i for i in range(n)],
        "budget": np.arange(n),
        "trainer_state": threading.Lock(),  # cannot be pickled, and is not asked for
        "log_extra": lambda *_: None,
    }
    spec = {"params": {"scale": 10}}
    values = make("length", **spec)(TEXTS[:n], **columns)
    assert values == make("length", **spec, workers=0)(TEXTS[:n], **columns)
    assert values == [None if i % 3 == 2 else 12.0 * i for i in range(n)]


@pytest.mark.slow
def test_built_in_rewards_have_the_same_values():
    texts = ["<answer>a</answer>", [{"role": "assistant", "content": "<answer>b</answer>"}], "", "<answer>a"]
    columns = {"answer": ["a"] * 4, "options": [["a", "b"]] * 4, "task": ["choice", "choice", "choice", "open"]}
    try:
        for name in ("choice", "format"):
            values = get_reward({"name": name, "workers": 2})(texts, **columns)
            assert values == get_reward(name)(texts, **columns)
    finally:
        workers.stop()


def test_parts_are_equal_to_within_one_and_in_order():
    columns = {"a": list(range(7)), "b": np.arange(14).reshape(7, 2), "c": "of all 7", "d": 7, "e": [1, 2]}
    parts = Rows(TEXTS, columns).parts(3)
    assert [len(part) for part in parts] == [2, 2, 3]
    assert [part.first for part in parts] == [0, 2, 4]
    assert [a for part in parts for a in part.columns["a"]] == list(range(7))
    assert parts[1].columns["b"].tolist() == [[4, 5], [6, 7]]
    assert all((p.columns["c"], p.columns["d"], p.columns["e"]) == ("of all 7", 7, [1, 2]) for p in parts)


def test_workers_are_lean_kept_and_shared_by_the_rewards_of_a_file(make, path):
    first, second = get_rewards(
        [{"name": f"{path}:{function}", "workers": 2, "weight": w} for function, w in (("pid", 1), ("other_pid", 2))]
    )
    pids = {p for _ in range(5) for p in [*first(TEXTS), *second(TEXTS)]}
    assert 1 <= len(pids) <= 2 and os.getpid() not in pids
    assert make("imported")(["", ""]) == [0.0, 0.0]


def test_async_rewards_are_awaited(make):
    assert make("wait")(TEXTS) == [1.0] * 7


def test_a_copy_runs_in_workers_too(make):
    original = make("do", timeout=5, on_error="none")
    copy = pickle.loads(pickle.dumps(original))
    assert copy.running == original.running
    assert copy(["a"], deed=[""]) == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["loop", "sleep", "regular expression", "sum"])
@pytest.mark.parametrize("thread", [False, True])
def test_the_time_limit_stops_what_hangs_in_any_thread(make, deed, thread):
    reward = make("do", timeout=0.3)
    reward(["a"], deed=[""])
    caught = []

    def call():
        with pytest.raises(RewardTimeout, match=r"'do' took longer than 0\.3 s for 2 completions; .*`timeout`") as e:
            reward(["a", "b", "c", "d"], deed=["", "", deed, ""])
        caught.append(e)

    started = time.monotonic()
    if thread:
        other = threading.Thread(target=call)
        other.start()
        other.join()
    else:
        call()
    assert time.monotonic() - started < 3
    assert "in reward 'do'" in caught[0].value.__notes__[0]
    assert reward(["a", "bb"], deed=["", ""]) == [1.0, 2.0]


def test_an_exception_keeps_its_type_and_shows_where_it_was_raised(make):
    with pytest.raises(KeyError, match="case") as error:
        make("do")(TEXTS, deed=[""] * 6 + ["fail"])
    notes = "\n".join(error.value.__notes__)
    assert 'in do\n    {}["case"]' in notes and "slow.py:do" in notes


def test_an_exception_that_cannot_be_handed_over_is_told(make):
    with pytest.raises(WorkerError, match="Odd: 429: too many") as error:
        make("do")(["a"], deed=["odd"])
    assert 'raise Odd(429, "too many")' in "\n".join(error.value.__notes__)


def test_a_worker_that_dies(make):
    reward = make("do")
    with pytest.raises(WorkerError, match=r"'do' died \(exit code 3\) on 3 completions from row 0 .*`on_error: none`"):
        reward(TEXTS, deed=["", "exit", *[""] * 5])
    assert reward(TEXTS, deed=[""] * 7) == [float(i) for i in range(7)]


def test_workers_that_died_between_batches_are_replaced(make):
    for p in {int(p) for _ in range(3) for p in make("pid")(TEXTS)}:
        os.kill(p, signal.SIGKILL)
    time.sleep(0.3)
    assert make("do")(TEXTS, deed=[""] * 7) == [float(i) for i in range(7)]


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["fail", "odd", "exit", "sum", "sleep"])
def test_on_error_none_finds_the_one_bad_row_of_eight(make, deed, caplog):
    reward = make("do", on_error="none", timeout=2)
    logged = {}
    deeds = ["", "", "none", "", "", deed, "", ""]
    started = time.monotonic()
    values = reward([*TEXTS, "a" * 7], deed=deeds, log_metric=logged.__setitem__)
    assert time.monotonic() - started < 4
    assert values == [0.0, 1.0, None, 3.0, 4.0, None, 6.0, 7.0]
    assert reward.counts == {"scored": 6, "none": 1, "errors": 1}
    assert (logged["rewards/do/errors"], logged["rewards/do/none"]) == (0.125, 0.125)
    assert "gives None for 1 of 8 completions" in caplog.text and "row 5 of the batch" in caplog.text


@pytest.mark.slow
def test_batches_larger_than_a_pipe_wait_behind_a_worker_that_hangs(make):
    reward = make("do", workers=1, on_error="none", timeout=2)
    values = reward(["a" * 300_000] * 4, deed=["", "sum", "", ""])
    assert values == [300_000.0, None, 300_000.0, 300_000.0]


def test_on_error_none_does_not_hide_a_broken_contract(make):
    with pytest.raises(RewardError, match="'do' returned str '1' for completion 3"):
        make("do", on_error="none")(TEXTS, deed=[""] * 3 + ["text"] * 4)


def test_what_crosses_the_border(make):
    columns = {
        "answer": [1, 2], "prompts": ["?", "?"], "completion_ids": [[1], [2]], "images": [None, None],
        "trainer_state": None, "log_metric": lambda *_: None, "log_extra": None, "environments": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"\['answer'\]"):
        make("received")(["a", "b"], **columns)
    picture = Image.new("RGB", (5, 5))
    prompt = [{"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "?"}]}]
    assert make("pictures")(["a", "b"], prompts=[prompt, "?"], image=[picture, picture]) == [5.0, 5.0]
    with pytest.raises(RewardError, match=r"column 'answer' cannot be handed to a worker process .*`workers: 0`"):
        make("length")(["a", "b"], answer=[threading.Lock()] * 2, budget=[1, 2])


@pytest.mark.slow
def test_what_workers_cannot_do_is_told_with_the_recipe(user_file, monkeypatch):
    path = user_file("def f(completions, log_extra, trainer_state=None): return [0.0] * len(completions)")
    with pytest.raises(InputError) as error:
        get_reward({"name": f"{path}:f", "workers": 1})
    assert [p.split("asks for")[1].split(",")[0] for p in error.value.problems] == [" 'trainer_state'", " 'log_extra'"]
    assert all("or set `workers: 0`" in p for p in error.value.problems)
    script = sys.modules["__main__"]
    monkeypatch.setattr(script, "scored_here", lambda completions: [0.0] * len(completions), raising=False)
    with pytest.raises(InputError, match="cannot find __main__:scored_here; move the function"):
        get_reward({"name": "__main__:scored_here", "workers": 1})
    assert get_reward("__main__:scored_here")(["a"]) == [0.0]


@pytest.mark.slow
def test_a_file_that_only_the_trainer_can_import_is_told(user_file):
    path = user_file(f"import os\nassert os.getpid() == {os.getpid()}, 'not here'\ndef f(completions): return [0.0]")
    try:
        with pytest.raises(RewardError, match=r"f\) cannot run in a worker process: not here"):
            get_reward({"name": f"{path}:f", "workers": 1, "on_error": "none"})(["a"])
    finally:
        workers.stop()


SCRIPT = """
import sys, threading, time
import numpy
from frugalpath.rewards import workers
from frugalpath.rewards.registry import get_reward
workers.GRACE = 0.5
print("script starts", flush=True)  # has no `if __name__ == "__main__"`: workers must not run it again
reward = get_reward({"name": sys.argv[1] + ":pid", "workers": 2})
pids = {int(p) for _ in range(10) for p in reward(["a"] * 8)}
print(*pids, flush=True)
deed = sys.argv[2]
if deed:
    hang = get_reward({"name": sys.argv[1] + ":do", "workers": 2, "timeout": 2})
    threading.Thread(target=lambda: hang(["a"], deed=[deed]), daemon=True).start()
    time.sleep(0.3)
if len(sys.argv) > 3:
    print("waits", flush=True)
    time.sleep(60)
"""


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["", "sum", "sleep"])
@pytest.mark.parametrize("killed", [False, True])
def test_no_worker_outlives_the_run(path, tmp_path, deed, killed):
    """Neither idle ones nor those that hang, whether the run ends by itself or is killed."""
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "run.py"), str(path), deed, *(["wait"] if killed else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "script starts\n"
    pids = [int(p) for p in run.stdout.readline().split()]
    assert pids
    family = psutil.Process(run.pid).children(recursive=True) if killed else []
    if killed:
        assert run.stdout.readline() == "waits\n"
        run.kill()
    started = time.monotonic()
    assert run.wait(timeout=10) == (-signal.SIGKILL if killed else 0)
    if not killed:
        assert time.monotonic() - started < 2
    waited = [*pids, *(p.pid for p in family)]
    while any(map(runs, waited)) and time.monotonic() - started < 5:
        time.sleep(0.02)
    assert not list(filter(runs, waited))
