from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import examples.minimal_loop as loop
from frugalpath.models.generation import generate_sure


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> loop.Options:
    """A few slides and steps."""
    return loop.Options(tmp_path_factory.mktemp("loop"), slides=12, warm_steps=4, steps=2, batch=4, group=3)


def test_both_policies_learn_and_figures_are_printed(options, capsys, monkeypatch):
    """Weights before and after the joint steps; SFT is done by then."""
    before = []

    def watched(performer, allocator, *rest):
        before.append([[p.detach().clone() for p in model.parameters()] for model in (performer.model, allocator)])
        return step(performer, allocator, *rest)

    step = loop.joint_step
    monkeypatch.setattr(loop, "joint_step", watched)
    performer, allocator = loop.train(replace(options, price=0.5))
    assert len(before) == 2
    for model, old in zip((performer.model, allocator), before[0], strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True))
        assert all(p.isfinite().all() for p in model.parameters())
    out = capsys.readouterr().out
    assert re.search(r"^step 2: accuracy [01]\.\d\d with [\d.]+ visual tokens$", out, re.M)
    figures = dict(re.findall(r"^test, (.*): accuracy ([01]\.\d\d) with [\d.]+ visual tokens$", out, re.M))
    assert list(figures) == ["1 tokens", "4 tokens", "16 tokens", "allocator"]


def test_log_probabilities_are_those_that_generation_adds_up(options):
    performer, splits = loop.build_world(options)
    performer.model.eval()
    prompts = [performer.prompt(c, b) for c, b in zip(splits["train"], (1, 16, 4), strict=False)]
    sight = performer.processor.sight
    written = generate_sure(performer.model, sight, prompts, [1] * 3, performer.greedy(5))
    with torch.no_grad():
        logs, counts = loop.log_probabilities(performer, prompts, [ids for ids, _ in written])
    assert counts.tolist() == [len(ids) for ids, _ in written]
    torch.testing.assert_close(logs.sum(1), torch.tensor([logp for _, logp in written]), atol=1e-4, rtol=1e-4)


def test_gold_answers_become_likelier(options):
    torch.manual_seed(0)
    performer, splits = loop.build_world(options)
    prompts = [performer.prompt(c, 4) for c in splits["train"]]
    gold = [loop.gold_ids(performer.processor.tokenizer, c) for c in splits["train"]]
    found = []
    for _ in range(2):
        with torch.no_grad():
            found.append(loop.log_probabilities(performer, prompts, gold)[0].sum().item())
        loop.warm_start(performer, splits["train"], options, random.Random(0))
    assert found[1] > found[0]


def test_the_example_stays_short_and_tells_its_arguments(monkeypatch, capsys):
    text = Path(loop.__file__).read_text()
    assert len(text.splitlines()) <= 250 and not re.search(r"\btrl\b", text)
    monkeypatch.setattr("sys.argv", ["minimal_loop.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        loop.main()
    assert "--price" in capsys.readouterr().out
