"""A gymnasium environment over a score table, so that any reinforcement learner can train an allocator.

    pip install gymnasium
    python examples/token_budget.py runs/demo/tables/grpo.val.jsonl --price 0.1

trains the simplest of learners, which sees the kind of question alone, and prints its mean reward beside those of
random budgets, the best static budget and the best budget of each case. With a library of learners:

    from examples.token_budget import TokenBudget, observations
    env = TokenBudget.from_table(ScoreTable.load(path), observations(*look(cases)), price=(0.003, 1.0))

Nothing is generated: what the frozen performer scores at every budget is known, and a step looks it up.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frugalpath.allocator.network import there
from frugalpath.allocator.score_table import ScoreTable
from frugalpath.errors import InputError, entry
from frugalpath.rewards.cost import OBJECTIVES, worth

try:
    import gymnasium
    from gymnasium import spaces
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("this example needs gymnasium; pip install gymnasium", name="gymnasium") from error

ID = "frugalpath/TokenBudget-v0"


def observations(look: torch.Tensor, question: torch.Tensor, buckets: int = 64) -> np.ndarray:
    """Pooled look and hashed bag of question tokens, (N, d + buckets) in float32.

    Args:
        look: (N, K, tokens, d), as `AllocatorInputs` gives it: the mean over tokens and the slides that are there.
        question: (N, T) hashed tokens, 0 is none: shares of the tokens in each bucket.
    """
    seen = there(look)[..., None, None]
    pooled = (look * seen).sum((1, 2)) / (seen.sum(1)[:, 0] * look.shape[2]).clamp_min(1)
    asked = torch.zeros(len(question), buckets)
    some = (question > 0).float()
    asked.scatter_add_(1, question % buckets, some / some.sum(1, keepdim=True).clamp_min(1))
    return torch.cat([pooled, asked], 1).numpy().astype(np.float32)


class TokenBudget(gymnasium.Env[np.ndarray, np.int64]):
    """One case an episode.

    In the plain mode an action is the rung of the ladder to answer at, and the episode ends. In the escalating mode
    the smallest budget has been looked at; 0 answers now and 1 looks at the next budget (at the largest there is none,
    and it answers too). Every look is paid for, so that the reward, which comes with the answer, is that of the sum of
    all looks: learn it without discount.

    An observation is the case's own, in the escalating mode the share of the ladder that was climbed and (if given)
    the performer's confidence at this budget, and last the price, (D + 1,) or (D + 2,) or (D + 3,) in float32.

    Args:
        score: (N, K) in 0..1. flops: (N, K) of an answer; the mean of the largest budget is cost 1.
        budgets: K budgets in tokens, ascending. observation: (N, D) of what may be seen before.
        price: lambda, or lowest and highest of a range from which each episode's is drawn log-uniformly.
        objective: see `frugalpath.rewards.cost`; `dual` is `linear` here, at the price that the learner sets by
            `reset(options={"price": ...})`.
        escalating: see above. confidence: (N, K) in 0..1, seen in the escalating mode.
        ids: of the cases, for `info`; their numbers by default.

    Raises:
        InputError: shapes do not fit, a value is not finite, or the price or objective is none.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        score: np.ndarray,
        flops: np.ndarray,
        budgets: Sequence[int],
        observation: np.ndarray,
        price: float | tuple[float, float] = 0.1,
        objective: str = "linear",
        escalating: bool = False,
        confidence: np.ndarray | None = None,
        ids: Sequence[str] | None = None,
    ):
        self.score, self.flops = np.asarray(score, dtype=float), np.asarray(flops, dtype=float)
        self.budgets, self.observation = list(budgets), np.asarray(observation, dtype=np.float32)
        self.low, self.high = (price, price) if isinstance(price, int | float) else price
        self.objective, self.escalating = objective, escalating
        self.confidence = None if confidence is None else np.asarray(confidence, dtype=np.float32)
        self._check()
        self.ids = list(ids) if ids is not None else [str(i) for i in range(len(self.score))]
        cost, tokens = self.flops / self.flops[:, -1].mean(), np.array(self.budgets, dtype=float)
        # Looks that came before are paid for too.
        self.cost = cost.cumsum(1) if escalating else cost
        self.tokens = tokens.cumsum() if escalating else tokens
        parts = [(self.observation.min(0), self.observation.max(0))]
        parts += [(np.zeros(1), np.ones(1))] * (escalating + (escalating and confidence is not None))
        # `reset` may set any price of 0 or more.
        parts.append((np.zeros(1), np.full(1, np.finfo(np.float32).max)))
        low, high = (np.concatenate(side).astype(np.float32) for side in zip(*parts, strict=True))
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = spaces.Discrete(2 if escalating else len(self.budgets))
        self._case: int | None = None

    @classmethod
    def from_table(cls, table: ScoreTable, observation: np.ndarray, **options: Any) -> TokenBudget:
        """Over the columns of a score table; `options` are those of the environment."""
        if options.get("escalating"):
            options = {"confidence": table.confidence, **options}
        return cls(table.score, table.flops, table.budgets, observation, ids=table.ids, **options)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The next case.

        Args:
            options: `case` (its row) and `price`, where they are not to be drawn.

        Raises:
            InputError: there is no such case or price.
        """
        super().reset(seed=seed)
        given = options or {}
        if unknown := sorted(set(given) - {"case", "price"}):
            raise InputError(f"reset: unknown option {unknown[0]!r}; known are case, price")
        n = len(self.score)
        case = int(given["case"]) if "case" in given else int(self.np_random.integers(n))
        if not 0 <= case < n:
            raise InputError(f"reset: case {case} is not in 0..{n - 1}")
        price = float(given["price"]) if "price" in given else self._draw_price()
        if not 0 <= price < math.inf:
            raise InputError(f"reset: price {price} is no number of 0 or more")
        self._case, self._price, self._rung = case, price, 0
        # Rows are compared with their own budgets alone, so that one row is enough.
        row = slice(case, case + 1)
        self._reward = worth(self.objective, self.score[row], self.tokens, self.cost[row], price, self.budgets[-1])[0]
        return self._observe(), self._info()

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Answer at a rung, or in the escalating mode answer or look on.

        Raises:
            RuntimeError: the episode is over, or `reset` was not called.
        """
        if self._case is None:
            raise RuntimeError("the episode is over; call reset()")
        if not self.action_space.contains(action):
            raise InputError(f"step: action {action!r} is not in {self.action_space}")
        if not self.escalating:
            self._rung = int(action)
        elif action == 1 and self._rung < len(self.budgets) - 1:
            self._rung += 1
            return self._observe(), 0.0, False, False, self._info()
        reward, observed, info = float(self._reward[self._rung]), self._observe(), self._info()
        self._case = None
        return observed, reward, True, False, info

    def _draw_price(self) -> float:
        low, high = (math.log(max(p, 1e-12)) for p in (self.low, self.high))
        return self.low if self.low == self.high else math.exp(self.np_random.uniform(low, high))

    def _observe(self) -> np.ndarray:
        parts = [self.observation[self._case]]
        if self.escalating:
            parts.append(np.array([self._rung / max(1, len(self.budgets) - 1)]))
            if self.confidence is not None:
                parts.append(self.confidence[self._case, self._rung : self._rung + 1])
        return np.concatenate([*parts, np.array([self._price])]).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        """Case, its score and cost at the present rung (looks before included), and the rung of the highest reward."""
        assert self._case is not None
        return {
            "case": self.ids[self._case],
            "score": float(self.score[self._case, self._rung]),
            "cost": float(self.cost[self._case, self._rung]),
            "oracle": int(self._reward.argmax()),
        }

    def _check(self) -> None:
        problems = []
        n, k = self.score.shape if self.score.ndim == 2 else (0, 0)
        if not n or k < 2:
            problems.append(f"score: shape {self.score.shape} is not (cases, budgets) with two budgets or more")
        for name in ("flops", "confidence"):
            value = getattr(self, name)
            if value is not None and value.shape != self.score.shape:
                problems.append(f"{name}: shape {value.shape} is not that of score, {self.score.shape}")
        if self.observation.ndim != 2 or len(self.observation) != n:
            problems.append(f"observation: shape {self.observation.shape} is not ({n}, D)")
        if len(self.budgets) != k or sorted(set(self.budgets)) != self.budgets or min(self.budgets, default=0) < 1:
            problems.append(f"budgets: {self.budgets} are not {k} ascending token counts of at least 1")
        for name in ("flops", "observation", "confidence"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                problems.append(f"{name}: has values that are not finite")
        if not (0 < self.low < self.high < math.inf or 0 <= self.low == self.high < math.inf):
            problems.append(f"price: {self.low}..{self.high} is no price of 0 or more, nor a range from above 0")
        if self.objective not in OBJECTIVES:
            problems.append(f"objective: {self.objective!r} is unknown; use one of {', '.join(OBJECTIVES)}")
        if problems:
            raise InputError(problems)


gymnasium.register(id=ID, entry_point=f"{__name__}:TokenBudget")


def learn(env: TokenBudget, states: np.ndarray, episodes: int, seed: int) -> np.ndarray:
    """Rungs (states,) of the highest mean reward, from episodes at random rungs.

    Args:
        states: (N,) what the learner sees of each case, as a whole number from 0.
    """
    rng = np.random.default_rng(seed)
    total, count = np.zeros((2, states.max() + 1, len(env.budgets)))
    for _ in range(episodes):
        case, rung = int(rng.integers(len(states))), int(rng.integers(len(env.budgets)))
        env.reset(options={"case": case})
        total[states[case], rung] += env.step(np.int64(rung))[1]
        count[states[case], rung] += 1
    return (total / count.clip(1)).argmax(1)


@entry
def main() -> None:
    """Train on half of a table's patients, and print one JSON line about the others."""
    parser = argparse.ArgumentParser(description="A budget for each kind of question, learned from a score table.")
    parser.add_argument("table", type=Path, help="score table of a run, such as runs/demo/tables/grpo.val.jsonl")
    parser.add_argument("--price", type=float, default=0.1, help="score that the largest budget costs")
    parser.add_argument("--episodes", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.table.is_file():
        raise InputError(f"{args.table}: no such score table; run rl/grpo.py first")
    table = ScoreTable.load(args.table)
    table = table.at([b for b in table.budgets if b])
    kinds, states = np.unique(table.questions, return_inverse=True)
    patients = np.unique(table.patients)
    seen = np.isin(table.patients, np.random.default_rng(args.seed).permutation(patients)[: len(patients) // 2])
    if seen.all() or not seen.any():
        raise InputError(f"{args.table}: has {len(patients)} patients; half are learned from, so give two or more")
    env = TokenBudget(table.score[seen], table.flops[seen], table.budgets, states[seen, None], args.price)
    rungs = learn(env, states[seen], args.episodes, args.seed)
    cost = table.flops / table.flops[seen, -1].mean()
    reward = worth("linear", table.score, table.visual, cost, args.price)
    static, held = int(reward[seen].mean(0).argmax()), reward[~seen]
    result = {
        "n": len(held),
        "budgets": {str(kind): table.budgets[rung] for kind, rung in zip(kinds, rungs, strict=True)},
        "learned": float(held[np.arange(len(held)), rungs[states[~seen]]].mean()),
        "static": float(held[:, static].mean()),
        "random": float(held.mean()),
        "oracle": float(held.max(1).mean()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
