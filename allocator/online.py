"""Policy gradient from drawn budgets, where there is no score table.

The allocator learns online, from the scores of the budgets that were drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from frugalpath.allocator.collapse import image_information
from frugalpath.allocator.network import AllocatorConfig, AllocatorInputs, AllocatorNetwork
from frugalpath.allocator.objectives import Objective, objective_of
from frugalpath.allocator.policy import PolicyConfig, PolicyNetwork, explored
from frugalpath.allocator.value import ValueNetwork
from frugalpath.distributed import same_draws
from frugalpath.envs.case import Case
from frugalpath.models.performer import Performer
from frugalpath.recipe.data import RunData
from frugalpath.recipe.run import Run
from frugalpath.rewards.cost import dual_price


def advantages(reward: torch.Tensor, kind: str = "rloo", weight: torch.Tensor | None = None) -> torch.Tensor:
    """Advantages (B, M) of the M draws of each case within the case.

    Args:
        reward: (B, M), M >= 2.
        kind: `rloo`: less the mean reward of the other draws, which leaves the gradient unbiased (Kool et al. 2019;
            Ahmadian et al. 2024). `grpo`: less the mean of all, over their standard deviation (Shao et al. 2024):
            biased, every case then counts the same however much is at stake.
        weight: importance (B, M) of the draws, where they come from another policy.
    """
    if kind == "grpo":
        return (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-4)
    counted = reward if weight is None else weight * reward
    return reward - (counted.sum(-1, keepdim=True) - counted) / (reward.shape[-1] - 1)


def sampled_loss(
    logits: torch.Tensor,
    rungs: torch.Tensor,
    reward: torch.Tensor,
    kind: str = "rloo",
    entropy: float = 0.0,
    behaviour: torch.Tensor | None = None,
) -> torch.Tensor:
    """A loss whose gradient is, with `rloo`, in the mean that of minus the expected reward.

    Args:
        logits: (B, rungs). rungs: (B, M), drawn independently. reward: (B, M).
        entropy: reward for a nat of entropy, whose gradient is exact.
        behaviour: probabilities (B, rungs) that the rungs were drawn by, where not by those of the logits.
    """
    logs = logits.log_softmax(-1)
    drawn = logs.gather(1, rungs)
    weight = torch.ones_like(drawn) if behaviour is None else drawn.detach().exp() / behaviour.gather(1, rungs)
    gain = weight * advantages(reward, kind, weight).to(logs.dtype) * drawn
    return -gain.mean() + entropy * (logs.exp() * logs).sum(-1).mean()


@dataclass(frozen=True)
class Drawn:
    """Budgets drawn for a batch.

    Args:
        look: (B, K, tokens, d). question: (B, T). price: (B,), at which they were drawn. rungs: (B, M).
    """

    look: torch.Tensor
    question: torch.Tensor
    price: torch.Tensor
    rungs: torch.Tensor


class AllocatorLearner(ABC):
    """Draws budgets and learns from what came of them.

    Args:
        allocator: the network that learns.
        look: makes its inputs.
        objective: what it maximises.
        price: lambda, the price of cost while exploring; the first one where the objective is `dual`.
        explore: share of uniform draws, so that no rung starves.
    """

    def __init__(
        self,
        allocator: AllocatorNetwork,
        look: AllocatorInputs,
        objective: Objective,
        price: float = 0.1,
        explore: float = 0.3,
        learning_rate: float = 2e-3,
    ):
        self.allocator, self.look, self.objective = allocator, look, objective
        self.price, self.explore = price, explore
        self.ladder = list(allocator.config.ladder)
        self.optimizer = torch.optim.AdamW(allocator.parameters(), learning_rate, weight_decay=1e-2)

    def draw(self, cases: Sequence[Case], count: int) -> Drawn:
        """Draw `count` budgets for each case from the exploring policy."""
        look, question = self.look(cases)
        price = self._prices(len(cases))
        return Drawn(look, question, price, self._draw(look, question, price, count))

    def update(
        self,
        look: torch.Tensor,
        question: torch.Tensor,
        rungs: torch.Tensor,
        score: torch.Tensor,
        price: torch.Tensor | None = None,
        epoch: float = 0.0,
    ) -> dict[str, float]:
        """One step on the scores (B, M) of the drawn rungs (B, M); returns metrics.

        Draws whose score is NaN are left out: nothing is known of them. Without any score there is no step.

        Args:
            price: (B,), at which they were drawn; the learner's own by default.
            epoch: passes over the training cases so far.
        """
        if price is None:
            price = torch.full((len(rungs),), self.price)
        told = self._told(score)
        look, question, rungs, score, price = (t[told] for t in (look, question, rungs, score, price))
        if not len(score):
            return {}
        self.allocator.train()
        with same_draws(self._updates()):
            loss = self._loss(look, question, rungs, score.clamp(0, 1), price, epoch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        best = self._best(look, question)
        metrics = {"loss": loss.item(), "score": score.nanmean().item(), **self._metrics(best, rungs, question)}
        if self.objective.target is not None:
            spent = self._spent(look, question, best)
            metrics |= {"price": self.price, "cost": spent.mean().item()}
            self.price = dual_price(self.price, spent.numpy(), self.objective.target)
        return metrics

    def _told(self, score: torch.Tensor) -> torch.Tensor:
        """Which cases (B,) tell something, by the scores of their draws (B, M)."""
        return ~score.isnan().all(1)

    def _updates(self) -> int:
        """Updates so far, those before a resumed checkpoint with them."""
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def _prices(self, count: int) -> torch.Tensor:
        """Prices (count,) to draw budgets at."""
        return torch.full((count,), self.price)

    @abstractmethod
    def _draw(self, look: torch.Tensor, question: torch.Tensor, price: torch.Tensor, count: int) -> torch.Tensor:
        """Rungs (B, count)."""

    @abstractmethod
    def _loss(
        self,
        look: torch.Tensor,
        question: torch.Tensor,
        rungs: torch.Tensor,
        score: torch.Tensor,
        price: torch.Tensor,
        epoch: float,
    ) -> torch.Tensor:
        """What a step makes smaller."""

    @abstractmethod
    def _best(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Rungs (B,) that it would choose at its own price, without exploring."""

    def _spent(self, look: torch.Tensor, question: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """Cost (B,) of what it does at its own price."""
        return torch.tensor(self.objective.cost)[best]

    def _metrics(self, best: torch.Tensor, rungs: torch.Tensor, question: torch.Tensor) -> dict[str, float]:
        share = (torch.bincount(best, minlength=len(self.ladder)) / len(best)).tolist()
        tokens = torch.tensor(self.ladder, dtype=torch.float32)
        metrics = {
            "drawn_tokens": tokens[rungs].mean().item(),
            "chosen_tokens": tokens[best].mean().item(),
            "largest_share": max(share),
            "smallest_budget": share[0],
            "largest_budget": share[-1],
        }
        if (below := self.objective.below_cap) is not None:
            metrics["below_cap"] = share[below]
        told = image_information(best.tolist(), [tuple(t for t in row if t) for row in question.tolist()])
        return metrics if told is None else {**metrics, "image_information": told}

    def save(self, folder: str | Path) -> None:
        """Write allocator, optimizer and price beside a trainer's checkpoint."""
        self.allocator.save_pretrained(Path(folder) / "allocator")
        state = self.optimizer.state_dict()["state"]
        flat = {f"{k}.{name}": v for k, entry in state.items() for name, v in entry.items()}
        flat["price"] = torch.tensor(self.price, dtype=torch.float64)
        save_file(flat, Path(folder) / "allocator" / "optimizer.safetensors")

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote."""
        # `from_pretrained` would share its weights out under ZeRO-3.
        self.allocator.load_state_dict(load_file(Path(folder) / "allocator" / "model.safetensors"))
        flat = load_file(Path(folder) / "allocator" / "optimizer.safetensors")
        self.price = flat.pop("price").item() if "price" in flat else self.price
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in flat.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": state})


class ValueLearner(AllocatorLearner):
    """Regression on the scores of the drawn rungs.

    Args:
        temperature: spread of the drawn budgets around the best one, in units of value.
        options: of `AllocatorLearner`.
    """

    allocator: ValueNetwork

    def __init__(self, *args, temperature: float = 0.03, **options):
        super().__init__(*args, **options)
        self.temperature = temperature

    @torch.no_grad()
    def _draw(self, look: torch.Tensor, question: torch.Tensor, price: torch.Tensor, count: int) -> torch.Tensor:
        """Different rungs while the ladder has them."""
        self.allocator.eval()
        value = self.objective(self.allocator(look, question).sigmoid(), price[:, None])
        policy = explored((value / self.temperature).softmax(-1), self.explore)
        # Where nothing is explored the second budget would have no probability at all.
        return torch.multinomial(policy.clamp_min(1e-9), count, replacement=count > len(self.ladder))

    def _loss(self, look, question, rungs, score, price, epoch) -> torch.Tensor:
        known = ~score.isnan()
        return F.binary_cross_entropy_with_logits(self.allocator(look, question).gather(1, rungs)[known], score[known])

    @torch.no_grad()
    def _best(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        self.allocator.eval()
        return self.objective.best(self.allocator(look, question).sigmoid(), self.price)


class PolicyLearner(AllocatorLearner):
    """Policy gradient on the rewards of the drawn rungs, at prices of the whole range so that one network serves all.

    The draws of a case are independent, so that two may be alike, and weighted for the uniform share among them.

    Args:
        kind: of the advantage. entropy: reward for a nat of entropy; decay: its factor for each epoch.
        options: of `AllocatorLearner`.
    """

    allocator: PolicyNetwork

    def __init__(self, *args, kind: str = "rloo", entropy: float = 0.03, decay: float = 1.0, **options):
        super().__init__(*args, **options)
        self.kind, self.entropy, self.decay = kind, entropy, decay

    def _prices(self, count: int) -> torch.Tensor:
        return super()._prices(count) if self.objective.target is not None else self.allocator.draw_prices(count)

    def _told(self, score: torch.Tensor) -> torch.Tensor:
        """An advantage compares the draws of a case, so that all must have a score."""
        return ~score.isnan().any(1)

    def _draw(self, look: torch.Tensor, question: torch.Tensor, price: torch.Tensor, count: int) -> torch.Tensor:
        return self.allocator.sample(look, question, price, count, self.explore)

    def _loss(self, look, question, rungs, score, price, epoch) -> torch.Tensor:
        # The network is still that which the rungs were drawn by.
        behaviour = explored(self.allocator.probabilities(look, question, price), self.explore)
        reward = self.objective(score, price[:, None], rungs)
        entropy = self.entropy * self.decay**epoch
        return sampled_loss(self.allocator(look, question, price), rungs, reward, self.kind, entropy, behaviour)

    def _best(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        return self.allocator.choose(look, question, self.price)

    def _spent(self, look: torch.Tensor, question: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        return self.allocator.probabilities(look, question, self.price) @ torch.tensor(self.objective.cost)


def network_class(run: Run) -> type[AllocatorNetwork]:
    """The network of the allocator's form; forms that have none of their own learn values."""
    return PolicyNetwork if run.allocator.form == "policy" else ValueNetwork


def new_network(data: RunData, performer: Performer) -> AllocatorNetwork:
    """A network that has learnt nothing yet."""
    options = data.run.allocator
    torch.manual_seed(data.run.grpo.seed)
    shape: dict[str, Any] = {
        "ladder": data.run.ladder,
        "look": options.look,
        "feature_dim": data.bank.dim,
        "width": options.width,
        "dropout": options.dropout,
    }
    make = network_class(data.run)
    config = PolicyConfig(options.price_range, **shape) if make is PolicyNetwork else AllocatorConfig(**shape)
    network = make(config)
    train = data.splits["train"]
    network.standardise(AllocatorInputs(performer, config)(train[:: max(1, len(train) // 512)])[0])
    return network


def new_learner(data: RunData, performer: Performer, explore: float | None = None) -> AllocatorLearner:
    """A new network that learns online; `explore` takes the place of the recipe's."""
    options, network = data.run.allocator, new_network(data, performer)
    look, objective = AllocatorInputs(performer, network.config), objective_of(data, performer)
    shared: dict[str, Any] = {
        "price": options.price,
        "explore": options.explore if explore is None else explore,
        "learning_rate": options.learning_rate,
    }
    if isinstance(network, PolicyNetwork):
        shared |= {"kind": options.advantage, "entropy": options.entropy, "decay": options.entropy_decay}
        return PolicyLearner(network, look, objective, **shared)
    return ValueLearner(network, look, objective, **shared, temperature=options.temperature)
