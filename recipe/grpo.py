"""Arguments of the trainers: TRL's, a switch for each shortcut, and the budgets of the joint step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig


def switch(text: str) -> bool:
    """A shortcut that is on unless it is switched off."""
    return field(default=True, metadata={"help": text})


@dataclass
class GroupConfig(GRPOConfig):
    """`GRPOConfig` with a switch for each piece of work that is done once; none changes the result.

    Args:
        shared_prefix: log-probabilities from one packed row for a prompt and its completions.
        prefill_once: generation reads each prompt once and expands its cache to the completions.
        see_once: a frozen vision tower reads each view once in a run, not in every forward.
        prefetch_images: images of the next batch are read and resized while this one is trained on; not in the
            joint step, where the budget is drawn first.
        skip_zero_advantage: groups without any advantage stay out of the update where their gradient is zero (no
            KL term, no entropy term). Entropy and clip ratios in the log are then those of the other groups.
        reuse_old_logps: old log-probabilities come from the update's own pass where the policy has not changed yet.
        skip_eval_loss: evaluation generates and scores, without a forward for a loss that means nothing; `eval_loss`,
            entropy, KL and clip ratios are then not logged. Off where `eval_loss` chooses the best checkpoint.
        flex_attention: packed rows by FlexAttention, which skips the pairs that a mask only hides. For a GPU.
        vision_cache: folder that keeps the features of a frozen vision tower over runs; null keeps none.
        vision_cache_gb: size limit of that folder; the least recently used features go first.
        vision_cache_dtype: "bfloat16" halves the space of float32 features; null keeps what the tower computes
            (bfloat16 where it runs in it), so that a cached run equals one without.
    """

    shared_prefix: bool = switch("one packed row for a prompt and its G completions")
    prefill_once: bool = switch("generation reads each prompt once, not G times")
    see_once: bool = switch("a frozen vision tower reads each image and budget once")
    prefetch_images: bool = switch("images of the next batch are prepared on other threads")
    skip_zero_advantage: bool = switch("groups without advantage stay out of the update")
    reuse_old_logps: bool = switch("old log-probabilities come from the update where it is on-policy")
    skip_eval_loss: bool = switch("no loss forward in evaluation")
    flex_attention: bool = field(default=False, metadata={"help": "FlexAttention for packed rows, on a GPU"})
    vision_cache: str | None = field(default=None, metadata={"help": "folder of cached vision features"})
    vision_cache_gb: float = field(default=50.0, metadata={"help": "size limit of vision_cache"})
    vision_cache_dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of cached features; null: as computed",
            "choices": ["float32", "bfloat16"],
        },
    )

    def __post_init__(self) -> None:
        # Otherwise several processes without an accelerator would not know of each other.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        if self.metric_for_best_model in ("loss", "eval_loss") or self.lr_scheduler_type == "reduce_lr_on_plateau":
            self.skip_eval_loss = False


MODES = ("joint", "alternating", "sequential")


@dataclass
class FrugalConfig(GroupConfig):
    """`GroupConfig` with the budgets of the joint step.

    Args:
        mode: `joint` trains performer and allocator on one set of rollouts; `alternating` trains them in turns, each
            on its own rollouts; `sequential` trains the performer alone, at budgets drawn uniformly, then the
            allocator on the answers of the frozen performer (BiRR4CPath, methods 1.2).
        alternate_every: steps of a turn in the mode `alternating`; the performer has the first.
        budgets_per_image: M, budgets drawn for each image in a joint step; each gets `num_generations` completions.
        gold_rollout: the last of the G completions is the gold answer and not a sample (mixed-policy GRPO: Yan et al.
            2025, LUFFY, section 3), so that a group of wrong answers still learns what is right. Rewards in the log
            count it; the allocator's score does not.
        disable_dropout: as in TRL, but on: with it the rollouts come from the policy that is updated.
    """

    mode: str = field(default="joint", metadata={"help": "who learns when", "choices": list(MODES)})
    alternate_every: int = field(default=10, metadata={"help": "steps of a turn in the mode alternating"})
    budgets_per_image: int = field(default=4, metadata={"help": "budgets (M) drawn for each image in a joint step"})
    gold_rollout: bool = field(default=False, metadata={"help": "the last of the G completions is the gold answer"})
    disable_dropout: bool = switch("no dropout in rollouts and updates")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is unknown; use one of {', '.join(MODES)}")
        if self.alternate_every < 1:
            raise ValueError(f"alternate_every is {self.alternate_every} steps; a turn has at least 1")
        if self.mode == "alternating" and self.fp16:
            # Its loss scaler takes a step without gradients for an error.
            raise ValueError("mode alternating does not go with fp16; set bf16 instead")
        if self.gold_rollout and self.use_vllm:
            raise ValueError("gold_rollout: vLLM has no log-probability of the gold answer; set use_vllm to false")
        block = self.budgets_per_image * self.num_generations
        local = self.per_device_train_batch_size * self.steps_per_generation
        if local % block:
            raise ValueError(
                f"per_device_train_batch_size x steps_per_generation = {local} completions a process, but an image "
                f"takes budgets_per_image x num_generations = {self.budgets_per_image} x {self.num_generations} = "
                f"{block}; make the first a multiple of {block}"
            )
