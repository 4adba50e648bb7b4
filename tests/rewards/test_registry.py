import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from frugalpath.errors import InputError
from frugalpath.rewards.registry import RewardError, RewardTimeout, get_reward, get_rewards, reward, reward_names

ROOT = Path(__file__).parents[2]
CHOICE = {"answer": ["a", "a"], "options": [["a", "b"]] * 2, "task": ["choice", "open"]}


def of(source, user_file, **spec):
    """The reward of a file that defines `f`."""
    return get_reward({"name": f"{user_file(source)}:f", **spec})


@pytest.mark.slow
def test_built_in_rewards_are_known_without_being_imported_by_the_caller():
    names = reward_names()
    assert {"choice", "ap50", "ap75", "ap50_95", "format", "linear_cost", "visionthink_cost", "dual_cost"} <= set(
        names
    )
    code = "from frugalpath.rewards.registry import get_reward; print(get_reward('ap50').name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "ap50\n"


@pytest.mark.slow
def test_rewards_do_not_import_torch():
    code = (
        "import sys; from frugalpath.rewards import registry; registry.reward_names(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_bare_name_and_a_spec():
    bare = get_reward("choice")
    assert (bare.name, bare.__name__, bare.weight, bare.params) == ("choice", "choice", 1.0, {})
    full = get_reward({"name": "format", "weight": 0.5, "params": {"soft": True}})
    assert (full.weight, full(["<answer>a</answer>"])) == (0.5, [0.5])
    assert get_reward({"name": "format", "params": None})([""]) == [0.0]
    assert bare(["<answer>a</answer>"] * 2, **CHOICE) == [1.0, None]
    assert bare([], answer=[], options=[], task=[]) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("choise", r"unknown reward 'choise'; did you mean 'choice'\? known: .*ap50, .*choice"),
        ("xyz", r"unknown reward 'xyz'; known: ap50"),
        ("my_rewards.py", "path.py:function"),
        ({}, "write a name"),
        ({"name": 3}, "write a name"),
        (None, "write a name"),
        ({"name": "choice", "wieght": 2}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"name": "choice", "weight": "1.0"}, "`weight` is '1.0'"),
        ({"name": "choice", "weight": True}, "`weight` is True"),
        ({"name": "choice", "weight": float("nan")}, "`weight` is nan"),
        ({"name": "choice", "timeout": 0}, "`timeout` is 0"),
        ({"name": "choice", "workers": -1}, "`workers` is -1; give a number of processes"),
        ({"name": "choice", "workers": True}, "`workers` is True"),
        ({"name": "choice", "workers": 1.5}, r"`workers` is 1\.5"),
        ({"name": "choice", "on_error": "ignore"}, "`on_error` is 'ignore'; write raise or none"),
        ({"name": "choice", "on_error": None}, "`on_error` is None; write raise or none"),
        ({"name": "choice", "scores": 0}, "`scores` is 0; write true, or false"),
        ({"name": "choice", "params": [1]}, "`params` is"),
        ({"name": "format", "params": {"sofd": True}}, "no parameter 'sofd'; did you mean 'soft'"),
        ({"name": "format", "params": {"columns": True}}, "no parameter 'columns'"),
        ({"name": "choice", "params": {"limit": 1}}, "no parameter 'limit'; known: none"),
        ({"name": "choice", "params": {"answer": "a"}}, "'answer' is a column"),
        ({"name": "choice", "params": {"completions": []}}, "'completions' is a column"),
        ("nowhere.py:f", r"no file .*nowhere\.py"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("rewards.nothing:f", "no module 'rewards'"),
        ("frugalpath.rewards.nothing:f", "no module 'frugalpath.rewards.nothing'"),
        ("frugalpath.rewards.label:choise", "no 'choise' in frugalpath.rewards.label; did you mean 'choice'"),
        ("frugalpath.rewards.cost:BIRR_CAP", "is not a function"),
        ("math:sqrt", r"'math:sqrt' does not take `completions`; write def sqrt\(completions"),
    ],
)
def test_what_is_wrong_with_a_spec(spec, message):
    with pytest.raises(InputError, match=message):
        get_reward(spec)


def test_all_problems_together():
    specs = [
        {"name": "choise", "weight": "x"},
        {"name": "format", "parms": {}, "params": {"sofd": 1, "task": 2}},
        "ap50",
        {"name": "ap50", "weight": 2},
    ]
    with pytest.raises(InputError) as error:
        get_rewards(specs)
    text = "\n".join(error.value.problems)
    assert len(error.value.problems) == 6
    assert all(word in text for word in ("choise", "weight", "parms", "sofd", "'task'", "'ap50' is named twice"))


def test_get_rewards_keeps_order_and_weights():
    found = get_rewards(["format", {"name": "choice", "weight": 2}])
    assert [(r.name, r.weight) for r in found] == [("format", 1.0), ("choice", 2.0)]


def test_what_is_built_in_for_shaping_does_not_score_unless_it_is_said_to():
    specs = ["choice", "format", {"name": "length", "scores": True}, {"name": "ap50", "weight": 2, "scores": False}]
    rewards = get_rewards(specs)
    assert [r.scores for r in rewards] == [True, False, True, False]
    assert [r.score_weight for r in rewards] == [1.0, 0.0, 1.0, 0.0]
    assert [r.score_weight for r in pickle.loads(pickle.dumps(rewards))] == [1.0, 0.0, 1.0, 0.0]


def test_path_is_relative_to_the_recipe_then_to_the_current_folder(user_file, tmp_path, monkeypatch):
    user_file("def f(completions): return [1] * len(completions)", "mine.py")
    assert get_reward("mine.py:f", base=tmp_path)(["a"]) == [1.0]
    with pytest.raises(InputError, match=r"mine\.py"):
        get_reward("mine.py:f")
    monkeypatch.chdir(tmp_path)
    assert get_reward("mine.py:f")(["a"]) == [1.0]
    (tmp_path / "recipes").mkdir()
    assert get_reward("mine.py:f", base=tmp_path / "recipes").name == "f"


def test_module_function():
    assert get_reward("frugalpath.rewards.label:choice")(["<answer>a</answer>"] * 2, **CHOICE) == [1.0, None]


def test_a_file_is_run_once_and_its_own_errors_are_shown(user_file, tmp_path):
    source = """
        import pathlib
        with open(pathlib.Path(__file__).with_name("n"), "a") as n:
            n.write("x")
        def f(completions): return [0] * len(completions)
        def g(completions): return f(completions)
    """
    path = user_file(source)
    get_rewards([f"{path}:f", f"{path}:g"])
    assert (tmp_path / "n").read_text() == "x"
    with pytest.raises(ZeroDivisionError):
        get_reward(f"{user_file('1 / 0', 'broken.py')}:f")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        get_reward(f"{user_file('import no_such_package', 'needs.py')}:f")
    with pytest.raises(ZeroDivisionError):  # a failed import is not remembered as a module
        get_reward(f"{tmp_path / 'broken.py'}:f")


def test_decorator_keeps_the_function_and_refuses_a_taken_name():
    def mine(completions):
        return [0.5] * len(completions)

    assert reward("mine_for_test")(mine) is mine
    assert get_reward("mine_for_test")(["a"]) == [0.5]
    reward("mine_for_test")(mine)  # the same again, as after a reload
    with pytest.raises(ValueError, match="is taken"):
        reward("mine_for_test")(lambda completions: [])
    with pytest.raises(ValueError, match="letters"):
        reward("my:reward")


def test_only_the_named_columns_are_passed(user_file):
    f = of("def f(completions, answer, hint=None, limit=3): return [limit if hint is None else 0]", user_file,
           params={"limit": 7})  # fmt: skip
    assert f(["a"], answer=["a"], task=["open"], trainer_state=object(), limit=[1]) == [7.0]
    assert f(["a"], answer=["a"], hint=["b"]) == [0.0]
    with pytest.raises(RewardError, match=r"'f' needs 'answer'.*columns here: task"):
        f(["a"], task=["open"])


def test_all_columns_are_passed_with_kwargs(user_file):
    f = of("def f(completions, limit=3, **columns): return [len(columns) + limit]", user_file, params={"limit": 10})
    assert f(["a"], answer=["a"], task=["open"]) == [12.0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[1, 0.5, True, None]", [1.0, 0.5, 1.0, None]),
        ("(1, 0, 0, 0)", [1.0, 0.0, 0.0, 0.0]),
        ("[np.float32(0.5), np.int64(2), np.bool_(True), np.float64(0)]", [0.5, 2.0, 1.0, 0.0]),
        ("np.array([1, 2, 3, 4])", [1.0, 2.0, 3.0, 4.0]),
        ("torch.tensor([1.0, 0.0, 0.5, 2.0])", [1.0, 0.0, 0.5, 2.0]),
    ],
)
def test_values_that_are_taken(value, expected, user_file):
    values = of(f"import numpy as np, torch\ndef f(completions): return {value}", user_file)(["a"] * 4)
    assert values == expected
    assert all(type(v) in (float, type(None)) for v in values)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1.0]", "returned 1 values for 2 completions"),
        ("[]", "returned 0 values"),
        ("None", "returned NoneType; return a list"),
        ("1.0", "returned float; return a list"),
        ("{1.0, 2.0}", "returned set"),
        ("(x for x in (1, 2))", "returned generator"),
        ("np.float64(1)", "returned float64"),
        ("np.ones((2, 2))", r"returned list \[1.0, 1.0\] for completion 0"),
        ("[1.0, '1']", "returned str '1' for completion 1"),
        ("[1.0, 1j]", "returned complex"),
        ("[1.0, torch.tensor(1.0)]", "returned Tensor"),
        ("[1.0, float('nan')]", "returned nan for completion 1; return a finite number, or None"),
        ("[np.inf, 1.0]", "returned inf for completion 0"),
    ],
)
def test_values_that_are_refused(value, message, user_file):
    f = of(f"import numpy as np, torch\ndef f(completions): return {value}", user_file)
    with pytest.raises(RewardError, match=f"reward 'f' {message}"):
        f(["a", "b"])


def test_an_exception_keeps_its_type_and_names_the_reward(user_file):
    with pytest.raises(ZeroDivisionError) as error:
        of("def f(completions): return [1 / 0]", user_file)(["a"])
    assert "in reward 'f'" in error.value.__notes__[0]
    assert "my_rewards.py:f" in error.value.__notes__[0]


def test_none_is_counted_and_logged():
    logged = {}
    choice = get_reward("choice")
    for _ in range(2):
        choice(["<answer>a</answer>"] * 2, **CHOICE, log_metric=logged.__setitem__)
    assert choice.counts == {"scored": 2, "none": 2, "errors": 0}
    assert 0 < logged.pop("rewards/choice/seconds") < 1
    assert logged == {"rewards/choice/none": 0.5, "rewards/choice/errors": 0.0}


def test_async_rewards_are_awaited(user_file):
    source = (
        "import asyncio\nasync def f(completions):\n    await asyncio.sleep(0)\n    return [1.0] * len(completions)"
    )
    assert of(source, user_file)(["a"]) == [1.0]


@pytest.mark.parametrize(
    "body",
    ["while True: pass", "time.sleep(30)", "re.match('(a+)+b', 'a' * 40)"],
    ids=["loop", "sleep", "regular expression"],
)
def test_a_slow_reward_times_out(body, user_file):
    f = of(f"import re, time\ndef f(completions):\n    {body}\n    return [1.0]", user_file, timeout=0.1)
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"'f' took longer than 0\.1 s"):
        f(["a"])
    assert time.monotonic() - started < 5


def test_the_limit_of_a_reward_that_calls_another_still_holds(user_file):
    source = """
        from frugalpath.rewards.registry import get_reward
        def f(completions):
            get_reward("format")(completions)
            while True:
                pass
    """
    with pytest.raises(RewardError, match="'f' took longer"):
        of(source, user_file, timeout=0.2)(["a"])


def test_a_timeout_that_the_function_swallows_is_a_timeout_all_the_same(user_file):
    source = """
        def f(completions):
            try:
                while True:
                    pass
            except Exception:
                return [1.0]
    """
    with pytest.raises(RewardTimeout, match=r"'f' took longer than 0\.1 s for 1 completion; .*`workers`"):
        of(source, user_file, timeout=0.1)(["a"])


RISKY = """
    import time
    def f(completions, deed):
        for d in deed:
            if d == "hang":
                while True:
                    pass
            if d == "fail":
                raise KeyError("no such case")
        return [None if d == "none" else len(c) for c, d in zip(completions, deed)]
"""


def test_on_error_none_finds_the_rows_that_fail_or_hang(user_file, caplog):
    f = of(RISKY, user_file, on_error="none", timeout=3)
    completions = ["a" * i for i in range(8)]
    logged = {}
    started = time.monotonic()
    deeds = ["", "", "hang", "", "none", "fail", "", ""]
    values = f(completions, deed=deeds, log_metric=logged.__setitem__)
    assert time.monotonic() - started < 3, "both tries together keep the limit of the batch"
    assert values == [0.0, 1.0, None, 3.0, None, None, 6.0, 7.0]
    assert f.counts == {"scored": 5, "none": 1, "errors": 2}
    assert (logged["rewards/f/errors"], logged["rewards/f/none"]) == (0.25, 0.125)
    (first,) = caplog.records
    assert "reward 'f' gives None for 2 of 8 completions" in first.getMessage()
    assert "row 2 of the batch: RewardTimeout" in first.getMessage() and first.exc_info
    assert f(["a", "b"], deed=["fail", ""]) == [None, 1.0]
    second = caplog.records[1]
    assert "KeyError: 'no such case'" in second.getMessage() and "3 so far" in second.getMessage()
    assert second.exc_info is None
    assert f(["a"], deed=["fail"]) == [None]
    assert f(["a"], deed=[""]) == [1.0]
    assert f.counts == {"scored": 7, "none": 1, "errors": 4}


def test_on_error_none_still_raises_what_is_wrong_with_the_function(user_file):
    f = of("def f(completions, answer): return [1.0]", user_file, on_error="none")
    with pytest.raises(RewardError, match="returned 1 values for 2"):
        f(["a", "b"], answer=["a", "b"])
    with pytest.raises(RewardError, match="needs 'answer'"):
        f(["a", "b"])
    path = user_file("def f(completions): return [0.0, float('nan')]", "other.py")
    with pytest.raises(RewardError, match="returned nan for completion 1"):
        get_reward({"name": f"{path}:f", "on_error": "none"})(["a", "b"])


def test_no_timer_is_left_behind(user_file):
    of("def f(completions): return [1.0]", user_file, timeout=0.05)(["a"])
    time.sleep(0.1)


def test_copies_find_their_function_again(user_file, monkeypatch, tmp_path):
    path = user_file("def f(completions, limit=1): return [limit] * len(completions)")
    monkeypatch.chdir(tmp_path)
    for spec in ("choice", {"name": "format", "weight": 0.5, "params": {"soft": True}, "timeout": 3},
                 {"name": f"{path.name}:f", "params": {"limit": 4}, "on_error": "none"}):  # fmt: skip
        original = get_reward(spec)
        copy = pickle.loads(pickle.dumps(original))
        assert (copy.name, copy.weight, copy.params, copy.running) == (
            original.name, original.weight, original.params, original.running)  # fmt: skip
    pickled = pickle.dumps(original)
    (tmp_path / "copy").write_bytes(pickled)
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'copy')!r}, 'rb'))(['a']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[4.0]\n"


def test_repr_names_what_was_configured():
    text = repr(get_reward({"name": "format", "weight": 0.5, "params": {"soft": True}}))
    assert all(part in text for part in ("'format'", "rewards.format:format_reward", "0.5", "'soft': True"))


def stock_rewards(funcs, inputs, completions):
    """TRL's own reward step on a stand-in for the trainer: rewards per function, and the metrics that were logged."""
    from trl import GRPOTrainer
    from trl.trainer.utils import get_callable_name

    metrics = {}
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=0),
        environments=None,
        reward_funcs=funcs,
        reward_processing_classes=[None] * len(funcs),
        reward_func_names=[get_callable_name(f) for f in funcs],
        _log_completion_extra=lambda column, values: None,
        _log_metric=metrics.__setitem__,
    )
    prompts = [row["prompt"] for row in inputs]
    values = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, [[1]] * len(inputs))
    return trainer.reward_func_names, values, metrics


def test_runs_in_stock_trl_with_and_without_the_wrapper():
    from frugalpath.rewards.detection import ap50
    from frugalpath.rewards.format import format_reward
    from frugalpath.rewards.label import choice

    rows = [
        {
            "id": "1",
            "task": "choice",
            "answer": "a",
            "options": ["a", "b"],
            "prompt": [{"role": "user", "content": "?"}],
        },
        {
            "id": "2",
            "task": "detection",
            "answer": "[]",
            "options": None,
            "prompt": [{"role": "user", "content": "?"}],
        },
    ]
    completions = [
        [{"role": "assistant", "content": "<think></think><answer>A</answer>"}],
        [{"role": "assistant", "content": "<answer>[]</answer>"}],
    ]
    expected = [[1.0, np.nan, 1.0], [np.nan, 1.0, 0.0]]
    wrapped = get_rewards(["choice", "ap50", "format"])
    names, values, metrics = stock_rewards(wrapped, rows, completions)
    assert names == ["choice", "ap50", "format"]
    torch.testing.assert_close(values, torch.tensor(expected), equal_nan=True)
    assert all(0 < metrics.pop(f"rewards/{name}/seconds") < 1 for name in names)
    assert metrics == {
        "rewards/choice/none": 0.5, "rewards/ap50/none": 0.5, "rewards/format/none": 0.0,
        "rewards/choice/errors": 0.0, "rewards/ap50/errors": 0.0, "rewards/format/errors": 0.0,
    }  # fmt: skip
    _, values, _ = stock_rewards([choice, ap50, format_reward], rows, completions)
    torch.testing.assert_close(values, torch.tensor(expected), equal_nan=True)


def test_every_built_in_reward_documents_itself():
    for name in ("choice", "ap50", "ap75", "ap50_95", "format", "linear_cost", "visionthink_cost", "dual_cost"):
        assert get_reward(name)._function.__doc__
        assert re.search(rf"`{name}`", (ROOT / "docs/rewards.md").read_text())


@pytest.mark.parametrize("name", ["multiplicative_cost", "log_cost", "oracle_regret_cost"])
def test_a_removed_reward_is_named_with_what_to_write_instead(name):
    with pytest.raises(InputError, match=rf"reward '{name}' was removed before 0\.1\.0, .* linear_cost; name that"):
        get_reward({"name": name, "params": {"price": 0.5}})
