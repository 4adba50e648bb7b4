"""GRPO of performer and allocator as one loop with nothing hidden: no recipe, no trainer, two minutes on two cores.

    python examples/minimal_loop.py --folder runs/minimal_loop

Simulated slides are drawn and encoded, a small performer learns the form of an answer from gold ones, and then both
policies learn from the same rollouts. `rl/grpo.py` does the same with reports, resuming, several GPUs and each piece
of work done once; its steps are these.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from frugalpath import Case, load_cases
from frugalpath.allocator.network import AllocatorConfig, AllocatorInputs
from frugalpath.allocator.value import ValueNetwork
from frugalpath.errors import entry
from frugalpath.models.build import PerformerConfig, build_performer
from frugalpath.models.generation import generate
from frugalpath.models.performer import Performer
from frugalpath.models.vision_adapter import Prompt, stack_positions
from frugalpath.recipe.features import load_features
from frugalpath.recipe.run import EncoderConfig
from frugalpath.rewards.format import format_reward
from frugalpath.rewards.label import choice
from frugalpath.sft.supervised import gold_ids

LADDER = [1, 4, 16]
"""Budgets that the allocator chooses among, in visual tokens."""
MOST = 12
"""Tokens that a completion may have."""


@dataclass
class Options:
    """What the loop may be called with.

    Args:
        slides: how many are drawn. warm_steps, steps: of SFT and of GRPO.
        batch: cases a step. draws: M, budgets drawn for each case. group: G, completions of each budget.
        price: lambda, the score that the largest budget is worth.
        warm_rate, rate, allocator_rate: learning rates of SFT, and of performer and allocator in GRPO.
    """

    folder: Path
    slides: int = 240
    warm_steps: int = 120
    steps: int = 40
    batch: int = 16
    draws: int = 2
    group: int = 4
    price: float = 0.1
    warm_rate: float = 1e-3
    rate: float = 3e-4
    allocator_rate: float = 3e-3
    seed: int = 0


def build_world(options: Options) -> tuple[Performer, dict[str, list[Case]]]:
    """An untrained performer that sees the slides' stored features, and the cases by split."""
    cases = load_cases(
        "simulator",
        folder=str(options.folder / "slides"),
        slides=options.slides,
        size_mm=0.448,
        mpp=2.0,
        questions=["diagnosis"],
        val_fraction=0.0,
        test_fraction=0.25,
        seed=options.seed,
        workers=1,
    )
    splits = {split: [c for c in cases if c.split == split] for split in ("train", "test")}
    # Slides are encoded once, by a frozen encoder: 7 x 7 features a tile, which are pooled to any budget later.
    encoder = EncoderConfig(cells=7, slide={"min_tissue": 0.0, "qc": False})
    bank = load_features(cases, encoder, options.folder / "features")
    shape = PerformerConfig(layers=2, hidden=64, heads=2, kv_heads=1, ffn=128, show_options=False)
    return build_performer(shape, splits["train"], bank, options.seed), splits


def log_probabilities(
    performer: Performer, prompts: Sequence[Prompt], written: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N, T) of what follows each prompt, 0 where there is nothing, and how many tokens (N,)."""
    rows, places, targets = [], [], []
    for prompt, ids in zip(prompts, written, strict=True):
        after = torch.tensor(ids)
        rows.append(torch.cat([prompt.ids, after]))
        # Image tokens may have positions of their own; text goes on after the last one.
        own = (prompt.next_position + torch.arange(len(after))).expand(len(prompt.positions), -1)
        places.append(torch.cat([prompt.positions, own], 1))
        targets.append(torch.cat([torch.full_like(prompt.ids, -1), after]))  # the prompt is not learned
    sight = performer.processor.sight
    out = performer.model(
        input_ids=pad_sequence(rows, batch_first=True, padding_value=performer.processor.tokenizer.pad_token_id),
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        position_ids=stack_positions(places),
        **sight.inputs(performer.model, [p.views for p in prompts]),
    )
    target = pad_sequence(targets, batch_first=True, padding_value=-1)[:, 1:]  # a token is predicted one before it
    logs = out.logits[:, :-1].log_softmax(-1).gather(2, target.clamp_min(0)[..., None])[..., 0]
    mask = target >= 0
    return logs * mask, mask.sum(1)


def step_of(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of an optimizer."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def warm_start(performer: Performer, cases: Sequence[Case], options: Options, draw: random.Random) -> None:
    """Gold answers at every budget: a policy that never answers in the right form would earn no reward at all."""
    optimizer = torch.optim.AdamW(performer.model.parameters(), options.warm_rate)
    performer.model.train()
    for _ in range(options.warm_steps):
        batch, budget = draw.sample(cases, min(options.batch, len(cases))), draw.choice(LADDER)
        gold = [gold_ids(performer.processor.tokenizer, case) for case in batch]
        logs, counts = log_probabilities(performer, [performer.prompt(c, budget) for c in batch], gold)
        step_of(optimizer, -logs.sum() / counts.sum())


def relative_costs(performer: Performer, cases: Sequence[Case]) -> torch.Tensor:
    """FLOPs (rungs,) of an answer at each budget, the largest = 1: what the price is a price of."""
    flops = [sum(performer.flops(performer.prompt(c, budget), MOST) for c in cases) for budget in LADDER]
    return torch.tensor(flops) / flops[-1]


def rewards_of(texts: Sequence[str], cases: Sequence[Case]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (N,), 1 for the right option, and rewards (N,), which also ask for the form of an answer."""
    right = choice(texts, [c.answer for c in cases], [c.options for c in cases])
    score = torch.tensor([value or 0.0 for value in right])
    return score, score + 0.2 * torch.tensor(format_reward(texts))


def joint_step(
    performer: Performer,
    allocator: ValueNetwork,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Sequence[Case],
    cost: torch.Tensor,
    options: Options,
) -> tuple[float, float]:
    """One step of both policies from one set of rollouts; returns mean score and mean visual tokens."""
    count, draws, group = len(batch), options.draws, options.group
    performer.model.eval()  # without dropout, rollouts come from the very policy that is updated
    # 1. The allocator looks at the cheapest tokens and the question, and draws M budgets for each image.
    look, question = AllocatorInputs(performer, allocator.config)(batch)
    budgets = torch.distributions.Categorical(logits=allocator(look, question))
    rungs = budgets.sample((draws,)).T  # (B, M)
    # 2. The performer writes G completions at each of them; a prompt is read once for all of its completions.
    asked = [case for case in batch for _ in range(draws)]
    prompts = [performer.prompt(c, LADDER[r]) for c, r in zip(asked, rungs.flatten().tolist(), strict=True)]
    sampling = GenerationConfig(
        **{**performer.greedy(MOST).to_diff_dict(), "do_sample": True, "temperature": 1.0, "top_k": 0}
    )
    written = generate(performer.model, performer.processor.sight, prompts, [group] * len(prompts), sampling)
    texts = performer.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
    score, reward = rewards_of(texts, [case for case in asked for _ in range(group)])
    # 3. Performer: completions of one image at one budget are compared with one another and with no others, so that
    #    none is blamed for a budget that it did not choose.
    groups = reward.view(count * draws, group)
    advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    logs, counts = log_probabilities(performer, [p for p in prompts for _ in range(group)], written)
    # On policy the ratio of new to old probabilities is 1 and nothing is clipped: its gradient is that of the log.
    step_of(optimizers[0], -(advantage[:, None] * logs).sum() / counts.sum())
    # 4. Allocator: a budget earns the mean score of its completions minus price times cost, and is compared with the
    #    other budgets of its image, which leaves the gradient unbiased (leave-one-out).
    earned = score.view(count, draws, group).mean(2) - options.price * cost[rungs]
    others = (earned.sum(1, keepdim=True) - earned) / (draws - 1)
    gain = (earned - others) * budgets.log_prob(rungs.T).T
    step_of(optimizers[1], -gain.mean() - 0.01 * budgets.entropy().mean())  # some entropy keeps it exploring
    return score.mean().item(), sum(p.visual for p in prompts) / len(prompts)


@torch.no_grad()
def evaluate(performer: Performer, allocator: ValueNetwork, cases: Sequence[Case]) -> dict[str, tuple[float, float]]:
    """Accuracy and mean visual tokens of greedy answers: at each fixed budget, and at those the allocator prefers."""
    allocator.eval()
    chosen = allocator(*AllocatorInputs(performer, allocator.config)(cases)).argmax(-1).tolist()
    asked = {f"{budget} tokens": [budget] * len(cases) for budget in LADDER}
    found = {}
    for name, budgets in {**asked, "allocator": [LADDER[rung] for rung in chosen]}.items():
        answers = performer.answer(cases, budgets, MOST)
        score, _ = rewards_of([answer.text for answer in answers], cases)
        found[name] = score.mean().item(), sum(answer.visual for answer in answers) / len(answers)
    return found


def train(options: Options) -> tuple[Performer, ValueNetwork]:
    """The whole of it, with figures on the way."""
    draw = random.Random(options.seed)
    performer, splits = build_world(options)
    print(f"{len(splits['train'])} cases to train on, {len(splits['test'])} to test", flush=True)
    warm_start(performer, splits["train"], options, draw)
    # Its outputs, one a budget, are taken for the logits of a policy.
    allocator = ValueNetwork(AllocatorConfig(LADDER, look=[1, 4], feature_dim=performer.bank.dim, dropout=0.0))
    allocator.standardise(AllocatorInputs(performer, allocator.config)(splits["train"])[0])
    optimizers = [
        torch.optim.AdamW(performer.model.parameters(), options.rate),
        torch.optim.AdamW(allocator.parameters(), options.allocator_rate),
    ]
    cost = relative_costs(performer, splits["train"][:16])
    allocator.train()
    for step in range(1, options.steps + 1):
        batch = draw.sample(splits["train"], min(options.batch, len(splits["train"])))
        score, tokens = joint_step(performer, allocator, optimizers, batch, cost, options)
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}: accuracy {score:.2f} with {tokens:.1f} visual tokens", flush=True)
    for name, (score, tokens) in evaluate(performer, allocator, splits["test"]).items():
        print(f"test, {name}: accuracy {score:.2f} with {tokens:.1f} visual tokens")
    return performer, allocator


@entry
def main() -> None:
    """Run the loop."""
    parser = argparse.ArgumentParser(description="GRPO of performer and allocator as one loop with nothing hidden.")
    parser.add_argument("--folder", type=Path, required=True, help="where slides and features are kept")
    for name in ("slides", "warm_steps", "steps", "batch", "draws", "group", "price", "warm_rate", "rate", "seed"):
        default = getattr(Options, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = Options(**vars(parser.parse_args()))
    torch.manual_seed(options.seed)
    train(options)


if __name__ == "__main__":
    main()
