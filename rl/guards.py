"""Watch a joint run for the ways in which either policy collapses, and name the remedy."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class CollapseGuard(TrainerCallback):
    """Reads the trainer's logs and warns once of each collapse; the warnings also go into the report.

    Args:
        patience: consecutive logs that must agree before a warning.
        fall: fall of the mean reward below its best smoothed value that counts as collapse of the performer.
        share: share of one rung among the allocator's choices that counts as collapse of the allocator.
        entropy: mean token entropy (nats) under which the performer no longer explores.
    """

    def __init__(self, patience: int = 3, fall: float = 0.15, share: float = 0.98, entropy: float = 1e-3):
        self.patience, self.fall, self.share, self.entropy = patience, fall, share, entropy
        self.warnings: list[str] = []
        self._smooth: float | None = None
        self._best = float("-inf")
        self._streak = {"reward": 0, "entropy": 0, "rung": 0, "silent": 0}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer: a resumed run has a history that counts."""
        for row in state.log_history:
            self.read(row["step"], row)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.read(state.global_step, logs or {})

    def read(self, step: int, logs: dict[str, Any]) -> None:
        """Take in the metrics logged at a step."""
        if "reward" not in logs:
            return
        reward = float(logs["reward"])
        self._smooth = reward if self._smooth is None else 0.7 * self._smooth + 0.3 * reward
        self._best = max(self._best, self._smooth)
        self._check(
            "reward",
            self._smooth < self._best - self.fall,
            step,
            f"the mean reward fell from {self._best:.3f} to {self._smooth:.3f}: the performer is collapsing; "
            "lower learning_rate, set beta (for example 0.02) or lower num_iterations",
        )
        self._check(
            "entropy",
            float(logs.get("entropy", 1.0)) < self.entropy,
            step,
            f"token entropy is {float(logs.get('entropy', 1.0)):.1e}: the performer no longer explores; "
            "raise temperature, lower learning_rate or stop the warm start earlier",
        )
        self._check(
            "rung",
            float(logs.get("allocator/largest_share", 0.0)) > self.share,
            step,
            f"the allocator gives {float(logs.get('allocator/largest_share', 0.0)):.0%} of the cases one budget; "
            "change allocator.price (lower if it is the smallest budget, "
            "higher if the largest) or raise allocator.explore",
        )
        self._check(
            "silent",
            float(logs.get("frac_reward_zero_std", 0.0)) > 0.98,
            step,
            "almost every group has equal rewards, so nothing is learnt; raise temperature or num_generations, "
            "or use harder cases",
        )

    def _check(self, kind: str, bad: bool, step: int, message: str) -> None:
        self._streak[kind] = self._streak[kind] + 1 if bad else 0
        if self._streak[kind] == self.patience:
            self.warnings.append(f"step {step}: {message}")
            logger.warning("step %d: %s", step, message)
