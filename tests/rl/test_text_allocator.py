"""The adapter that writes a budget learns, resumes, decides; the performer stays as it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from frugalpath.allocator.base import TrainedRun
from frugalpath.allocator.objectives import Objective
from frugalpath.allocator.text import BudgetWriter
from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.models.build import PerformerConfig, build_performer
from frugalpath.models.performer import SlidePerformer
from frugalpath.recipe.checkpoints import stage_seconds
from frugalpath.recipe.grpo import FrugalConfig
from frugalpath.recipe.run import SYSTEM, TURN, AllocatorOptions, TextOptions
from frugalpath.rewards.registry import get_rewards
from frugalpath.rewards.scoring import Scorer
from frugalpath.rl.text_allocator import TokenReward, fit_text, text_config, train_text
from frugalpath.sft.supervised import sft_config, train_sft
from frugalpath.values import checked
from tests.conftest import LADDER
from tests.rewards.test_vectors import VECTORS
from tests.rl.qwen import SHORT_RUN

HARDLY = {
    "max_steps": 15,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "per_device_train_batch_size": 8,
    "disable_tqdm": True,
}
"""A warm start that is enough to have something to resume from."""


@pytest.fixture(scope="module")
def taught(cases, bank, tmp_path_factory):
    """Folder of a performer that answers; its tokenizer knows the words that ask for a budget."""
    folder = tmp_path_factory.mktemp("taught")
    # Narrower, and the frozen head could not be sure of a digit that it was never trained on.
    shape = {"layers": 1, "hidden": 128, "heads": 2, "kv_heads": 1, "ffn": 64, "vocab_size": 600, "aligner_width": 16}
    config = PerformerConfig(**shape, show_options=False)
    performer = build_performer(config, cases, bank, texts=(SYSTEM, TURN))
    options = {"max_steps": 40, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "save_strategy": "no"}
    train_sft(performer, cases, LADDER, sft_config(folder, {**options, "disable_tqdm": True}, 0))
    performer.save(folder)
    return folder


@pytest.fixture
def make_taught(taught, bank):
    """Reads it, in eval mode."""

    def make() -> SlidePerformer:
        performer = SlidePerformer.load(taught, bank, show_options=False)
        performer.model.eval()
        return performer

    return make


@pytest.fixture
def make_stages(cases, tmp_path):
    """What the form needs of a run, over the miniature world."""

    def make(name: str = "run", text: dict | None = None, shown: list[Case] = cases, **grpo) -> SimpleNamespace:
        options = {
            "look": 4,
            "warm_start": {
                "max_steps": 50,
                "learning_rate": 1e-2,
                "disable_tqdm": True,
                "per_device_train_batch_size": 8,
                "warmup_steps": 10,
            },
            "grpo": {"num_generations": 4, "max_steps": 4, "save_steps": 2},
            **(text or {}),
        }
        arguments = {"save_strategy": "steps", "save_steps": 2, "num_generations": 2, "budgets_per_image": 2, **grpo}
        config = FrugalConfig(
            **{**SHORT_RUN, "output_dir": str(tmp_path / name), "per_device_train_batch_size": 8, **arguments}
        )
        run = SimpleNamespace(
            folder=tmp_path / name,
            ladder=list(LADDER),
            grpo=config,
            allocator=checked(AllocatorOptions, {"form": "text", "text": options}, "allocator"),
            evaluation=SimpleNamespace(batch_size=8),
            rewards=["tests.rl.test_text_allocator:sees_enough"],
            base=tmp_path,
        )
        split = {"train": shown, "val": shown[:4], "test": shown[4:]}
        scorer = Scorer(get_rewards(["tests.rl.test_text_allocator:sees_enough"]), LADDER[-1])
        return SimpleNamespace(run=run, splits=split, scorer=scorer, max_new_tokens=8)

    return make


def trained(data: SimpleNamespace, performer: SlidePerformer) -> TrainedRun:
    return TrainedRun(data, performer, Objective("linear", LADDER, (0.1, 0.3, 1.0)), key={"seed": 0})


def sees_enough(completions, tokens, **columns) -> list[float]:
    """A reward that 4 tokens are enough for."""
    return [float(n >= 4) for n in tokens]


@pytest.mark.parametrize(
    ("native", "answer", "score", "worth"),
    VECTORS,
)
def test_the_published_vectors(performer, cases, monkeypatch, native, answer, score, worth):
    """Methods 1.11."""
    allocator = BudgetWriter(performer, {"r": 4}, look=4, default=256)
    monkeypatch.setattr(performer, "native", lambda source: native)
    monkeypatch.setattr(performer, "room", lambda source: native)
    asked: list[int] = []

    def answers(some, budgets):
        asked.extend(budgets)
        return [SimpleNamespace(score=score) for _ in some]

    reward = TokenReward(allocator, answers, cases, "birr", 0.1, [16, 256])
    text = f"<think></think><answer>{answer}</answer>"
    logged = {}
    assert reward([text], index=[0], log_metric=logged.__setitem__) == [pytest.approx(worth)]
    assert logged["allocator/readable"] == float(bool(asked))
    if asked:
        assert asked == [min(native, int(answer.split()[0]))]


def test_the_other_preset_has_a_price(performer, cases):
    allocator = BudgetWriter(performer, {"r": 4}, look=4, default=16)

    def answers(some, budgets):
        return [SimpleNamespace(score=1.0) for _ in some]

    texts = [f"<think></think><answer>{n}</answer>" for n in (4, 16, "none")]
    linear = TokenReward(allocator, answers, cases, "linear", 0.4, LADDER)
    assert linear(texts, index=[0, 0, 0]) == pytest.approx([0.9, 0.6, -0.4])


@pytest.mark.slow
def test_the_adapter_learns_and_the_performer_stays_bit_for_bit(make_taught, make_stages, cases):
    performer = make_taught()
    before = copy.deepcopy(performer.model.state_dict())
    answers = performer.answer(cases, [16, 4] * 4, 6)
    grpo = {"num_generations": 8, "max_steps": 12, "per_device_train_batch_size": 32, "learning_rate": 2e-3}
    stages = make_stages(text={"grpo": {**grpo, "save_strategy": "no"}})
    allocator = train_text(trained(stages, performer))
    folder = stages.run.folder
    taught, learnt = (
        torch.cat([v.flatten() for v in load(folder / name).values()]) for name in ("text_warm_start", "text")
    )
    assert not torch.equal(taught, learnt), "GRPO moved the adapter"
    now = {n.replace("base_layer.", ""): v for n, v in performer.model.state_dict().items() if "lora_" not in n}
    assert set(now) == set(before) and all(torch.equal(value, before[name]) for name, value in now.items())
    again = performer.answer(cases, [16, 4] * 4, 6)
    assert [(a.text, a.confidence) for a in again] == [(a.text, a.confidence) for a in answers]
    assert set(stage_seconds(folder)) == {"text_warm_start", "text"}
    record = json.loads((folder / "text" / "done.json").read_text())
    log = [row for row in record["log"] if "reward" in row]
    assert log[0]["allocator/readable"] > 0.5, "it was taught to write integers"
    worth = [row["rewards/tokens/mean"] for row in log]
    assert len(log) == record["steps"] == 12 and np.mean(worth[-3:]) > worth[0], "4 tokens are worth more than 2 or 16"
    assert record["flops"] > 0
    read = train_text(trained(stages, make_taught()))
    assert read.ask(cases, 8) == allocator.ask(cases, 8), "a finished stage is read"


def load(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_a_resumed_stage_ends_where_the_whole_one_ends(make_taught, make_stages, beta):
    ends = []
    for cut in (False, True):
        name = f"cut{cut}"
        if cut:
            half = {"warm_start": HARDLY, "grpo": {"num_generations": 4, "max_steps": 2}}
            train_text(trained(make_stages(name, half, beta=beta), make_taught()))
            (make_stages(name).run.folder / "text" / "done.json").unlink()
        stages = make_stages(name, {"warm_start": HARDLY}, beta=beta)
        train_text(trained(stages, make_taught()))
        ends.append(load(stages.run.folder / "text"))
        log = json.loads((stages.run.folder / "text" / "done.json").read_text())["log"]
        assert [row["step"] for row in log if "reward" in row] == [1, 2, 3, 4]
        if beta:
            assert log[3]["kl"] > 0
        taught = load(stages.run.folder / "text_warm_start")
        assert any(not torch.equal(value, ends[-1][key]) for key, value in taught.items())
    assert set(ends[0]) == set(ends[1])
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_decides_once_whatever_the_price(make_taught, make_stages, cases, monkeypatch):
    quick = {"warm_start": HARDLY, "grpo": {"num_generations": 4, "max_steps": 1}}
    stages, performer = make_stages(text=quick), make_taught()
    decider = fit_text(trained(stages, performer))
    assert decider.prices([0.0, 0.1, 1.0]) == [0.0] and decider.predicted("test") is None
    decisions = decider.decide("test", 0.3)
    asked = decider.writer.ask(cases[4:], 8)
    budgets = [a.budget for a in asked]
    assert decisions.price == 0.3 and [d["budget"] for d in decisions.details] == budgets
    answers = performer.answer(cases[4:], budgets, 8)
    assert [d["completion"] for d in decisions.details] == [a.text for a in answers]
    assert decisions.visual.tolist() == [a.visual for a in answers]
    assert decisions.flops.tolist() == [a.flops for a in answers]
    assert decisions.look.tolist() == [a.flops for a in asked]
    assert decisions.score.tolist() == sees_enough(None, decisions.visual)
    prompt = decider.writer.prompt(cases[4])
    assert decisions.look[0] > performer.shape.prefill(len(prompt)), "the whole pass of the allocator is paid for"
    rungs, flops = decider.choose(cases[4:], 0.3)
    assert rungs.tolist() == decisions.rungs.tolist() and flops.tolist() == decisions.look.tolist()
    assert (decider.look_ms(decider.data.splits["test"][:2], 0.1) > 0).all()
    monkeypatch.setattr(BudgetWriter, "ask", lambda *rest: pytest.fail("what was decided is kept"))
    later = fit_text(trained(make_stages(text=quick), make_taught())).decide("test", 0.3)
    assert np.array_equal(later.score, decisions.score) and later.details == decisions.details
    # Of other rewards, and of an earlier version, which kept no key, the answers are scored again and none is written.
    path = stages.run.folder / "text" / "test.jsonl"
    head, *rows = path.read_text().splitlines()
    path.write_text("".join(f"{json.dumps({**json.loads(row), 'score': 0.5})}\n" for row in rows))
    later = fit_text(trained(make_stages(text=quick), make_taught())).decide("test", 0.3)
    assert np.array_equal(later.score, decisions.score) and path.read_text().splitlines()[0] == head
    other = make_stages(text=quick)
    other.run.rewards, other.scorer = ["choice"], Scorer(get_rewards(["choice"]), LADDER[-1])
    scored = fit_text(trained(other, make_taught())).decide("test", 0.3)
    texts = [row["completion"] for row in decisions.details]
    assert scored.score.tolist() == other.scorer(texts, cases[4:], budgets, [1] * len(texts)).tolist()


def test_it_learns_over_qwen_too(make_qwen, make_stages, image_cases):
    """One of the cases shows no image."""
    performer = make_qwen()
    before = performer.answer(image_cases, [4] * 6, 4)
    stages = make_stages(text={"warm_start": None, "grpo": {"num_generations": 4, "max_steps": 1}}, shown=image_cases)
    decisions = fit_text(trained(stages, performer)).decide("val", 0.1)
    assert [d["budget"] for d in decisions.details] == [16, 10, 0, 16], "no more than the images give"
    assert decisions.visual.tolist() == [16, 10, 0, 8]
    assert [a.text for a in performer.answer(image_cases, [4] * 6, 4)] == [a.text for a in before]


def test_rungs_are_the_nearest_by_doublings(make_performer, make_stages):
    decider = fit_text(trained(make_stages(text={"warm_start": None, "grpo": {"max_steps": 1}}), make_performer()))
    assert decider._nearest([0, 1, 2, 3, 7, 9, 16, 300]).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    (warning,) = decider.warnings()
    assert "writes no budget for 100% of the validation cases, which then get 16 tokens" in warning
    assert "allocator.text.warm_start" in warning


def test_arguments_of_the_stage(make_stages):
    stages = make_stages(gradient_accumulation_steps=2)
    own = text_config(stages.run.grpo, stages.run.folder / "text", {"num_generations": 4, "learning_rate": 1e-5})
    assert (own.num_generations, own.learning_rate, own.budgets_per_image, own.beta) == (4, 1e-5, 1, 0.0)
    assert own.steps_per_generation == 2 and own.generation_batch_size == 16
    with pytest.raises(InputError, match=r"allocator.text.grpo: .*max_step"):
        text_config(stages.run.grpo, stages.run.folder, {"max_step": 3})
    with pytest.raises(InputError, match=r"allocator.text: unknown key 'loook'; did you mean 'look'"):
        checked(AllocatorOptions, {"text": {"loook": 4}}, "allocator")
    wrong = checked(AllocatorOptions, {"form": "text", "text": {"preset": "dual"}}, "allocator")
    assert "allocator.text.preset: 'dual' is unknown" in " ".join(wrong.problems())
    assert isinstance(wrong.text, TextOptions)
