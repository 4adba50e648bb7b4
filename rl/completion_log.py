"""What `log_completions` adds to TRL's log of completions: budgets, pictures as they were shown, and TensorBoard.

Without it no text and no picture leaves the trainer, only figures.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from transformers.integrations import TensorBoardCallback
from trl import GRPOTrainer
from trl.trainer.utils import strip_images_from_messages

from frugalpath.evaluation.report.pictures import as_seen, read_whole
from frugalpath.models.feature_bank import VisualTokens
from frugalpath.models.image_view import ImageView
from frugalpath.models.vision_adapter import Prompt
from frugalpath.rl.rollout import Rollout

COLUMNS = ("budget", "tokens")
"""Columns of the rollouts that are logged beside completions."""
SHOWN = 8
"""Completions of a step that TensorBoard gets where `num_completions_to_print` does not say."""


class CompletionLog(GRPOTrainer):
    """`GRPOTrainer` that logs what its completions were shown.

    TRL writes completions to `completions/*.parquet` of the output folder and to wandb and trackio. Pictures are made
    only for steps that are logged.
    """

    _batch: Rollout
    _fresh_rows: list[Prompt] | None = None
    """Prompt of each row of the last rollouts, until they are logged."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.log_completions:
            for column in COLUMNS:
                if column in inputs[0]:
                    self._log_completion_extra(column, [row[column] for row in inputs])
        output = super()._generate_and_score_completions(inputs)
        if self.log_completions and self.model.training:
            self._fresh_rows = [self._batch.prompts[i] for i in self._batch.rows]
        return output

    @cached_property
    def _slides(self) -> frozenset[str]:
        """Sources that are read as slides."""
        return frozenset(s for case in getattr(self, "cases", ()) for s in case.slides)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As its base, with the pictures of the last rollouts beside their completions."""
        rows = self._fresh_rows if self.model.training else None
        self._logs["images"].clear()
        if rows is not None:
            self._fresh_rows = None
            if self.log_multimodal:
                made = {id(prompt): pictures(prompt, self._slides) for prompt in rows}
                self._logs["images"].extend(gather_object([made[id(prompt)] for prompt in rows]))
        super().log(logs, start_time)
        if rows is not None and self.accelerator.is_main_process:
            self._to_tensorboard()

    def _to_tensorboard(self) -> None:
        callbacks = (c for c in self.callback_handler.callbacks if isinstance(c, TensorBoardCallback))
        writers = [c.tb_writer for c in callbacks if c.tb_writer is not None]
        if not writers:
            return
        most = self.num_completions_to_print or SHOWN
        kept = self._logs
        columns = {
            "prompt": [_text(messages) for messages in kept["prompt"]],
            **{name: list(values) for name, values in kept["extra"].items()},
            "completion": [_text(messages) for messages in kept["completion"]],
            **{name: list(values) for name, values in kept["rewards"].items()},
        }
        rows = list(zip(*columns.values(), strict=True))
        # The rows of a prompt stand together; some of all prompts say more than all of some.
        step = max(1, len(rows) // most)
        chosen = range(0, len(rows), step)[:most]
        lines = [list(columns), ["---"] * len(columns), *([_cell(v) for v in rows[i]] for i in chosen)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        images = list(kept["images"])
        for writer in writers:
            writer.add_text("completions", table, self.state.global_step)
            for number, i in enumerate(chosen if images else ()):
                for image in images[i]:
                    pixels = np.asarray(image.convert("RGB"))
                    writer.add_image(f"shown/{number}", pixels, self.state.global_step, dataformats="HWC")


def pictures(prompt: Prompt, slides: Collection[str]) -> list[Image.Image]:
    """The images and slides of a prompt as they were shown; none of what has no pixels to read.

    Args:
        slides: sources that are read as slides.
    """
    made = []
    for view in prompt.views:
        if isinstance(view, ImageView):
            made.append(view.image())
        elif isinstance(view, VisualTokens):
            pixels = read_whole(view.source, slide=view.source in slides)
            if pixels is not None:
                made.append(Image.fromarray(as_seen(view, pixels)[0]))
    return made


def _text(messages: Any) -> str:
    """The words of a conversation."""
    if isinstance(messages, str):
        return messages
    parts: Sequence[Any] = [m["content"] for m in strip_images_from_messages(messages)]
    flat = [part for content in parts for part in ([content] if isinstance(content, str) else content)]
    return "\n".join(p if isinstance(p, str) else p.get("text", "") for p in flat)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
