"""Rollouts by vLLM: what TRL 1.16's `VLLMGeneration` leaves to do where prompts have images at a budget.

vLLM runs the stock image processor itself and lays out an image's tokens in the prompt. So that it reads exactly what
the update reads, it is handed images at their budget; inside the trainer's process also prompts with one token an
image, since it would lay out longer ones a second time (huggingface/trl issue 6294).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl.import_utils import is_vllm_available

from frugalpath.errors import InputError
from frugalpath.models.vision_adapter import VisionAdapter

BANNED = -100.0
"""Logit bias that keeps a token from being written; servers take none beyond it."""


def require_vllm() -> None:
    """Refuse a machine without vLLM.

    Raises:
        InputError: it is not installed.
    """
    if not is_vllm_available():
        raise InputError(
            "use_vllm: vLLM is not installed; on a machine with a GPU pip install 'frugalpath[vllm]', or set use_vllm "
            "to false"
        )


def require_servable(model: Any, sight: VisionAdapter | None, mode: str) -> None:
    """Refuse a model that vLLM cannot write for, before it is started.

    Args:
        model: the policy, or its name. sight: how it takes in images, None where that is not known yet.
        mode: "colocate" or "server".

    Raises:
        InputError: it sees in a way that vLLM does not know, or vLLM has nowhere to load it from.
    """
    if sight is not None and not sight.stock:
        raise InputError(
            f"use_vllm: vLLM serves stock models, and does not see as a {type(sight).__name__} does; set use_vllm to "
            "false, or use performer.family qwen_vl"
        )
    if mode == "colocate" and not (model if isinstance(model, str) else model.name_or_path):
        raise InputError(
            "use_vllm: vLLM loads the model from a folder or a hub, and this one was made in memory; set "
            "performer.pretrained, add a stage to sft, or set use_vllm to false"
        )


class VLLMRollouts:
    """Takes the place of TRL's `VLLMGeneration` in a trainer, and hands its work on to it.

    An image token is never written, as it would have no image.

    Args:
        stock: TRL's, with vLLM started.
        sight: how the model takes in images.
    """

    def __init__(self, stock: Any, sight: VisionAdapter):
        self.stock, self.sight = stock, sight
        if sight.image_token_id is not None:
            own = stock.generation_kwargs
            bias = {**(own.get("logit_bias") or {}), sight.image_token_id: BANNED}
            stock.generation_kwargs = {**own, "logit_bias": bias}

    def sync_weights(self) -> None:
        """Hand the weights over; what a vision tower that is trained saw before is forgotten.

        vLLM keeps what the tower makes of an image by the image alone. TRL resets the prefix cache only
        (huggingface/trl issue 7198). With a frozen tower it stays true, and is kept.

        Raises:
            RuntimeError: the server has no such endpoint.
        """
        self.stock.sync_weights()
        if not self.sight.trained:
            return
        if self.stock.mode == "colocate":
            self.stock.llm.llm_engine.reset_encoder_cache()
        elif self.stock.accelerator.is_main_process:
            client = self.stock.vllm_client
            # Its answer is empty, which the client's own `_post` takes for broken JSON.
            answer = client.session.post(f"{client.base_url}/reset_encoder_cache")
            if answer.status_code != 200:
                raise RuntimeError(
                    f"{client.base_url}/reset_encoder_cache answered {answer.status_code}: the vision tower is "
                    "trained, and the server would go on with what it saw before; start it with "
                    "VLLM_SERVER_DEV_MODE=1, or set performer.freeze_vision to true"
                )

    def generate(
        self, prompts: list[list[int]], images: list[list | None] | None, num_generations: int, profiler: Any = None
    ) -> tuple:
        """As TRL's.

        Args:
            prompts: token ids of each row, with all tokens of its images.
            images: of each row, at their budget.

        Raises:
            RuntimeError: vLLM read another prompt than the update will.
        """
        handed, token = prompts, self.sight.image_token_id
        if images is not None and self.stock.mode == "colocate":
            handed = [one_token_an_image(ids, token) for ids in prompts]
        read, *written = self.stock.generate(handed, images, num_generations, profiler)
        for row, (ids, own) in enumerate(zip(read, prompts, strict=True)):
            if list(ids) != own:
                seen, asked = (sum(t == token for t in each) for each in (ids, own))
                raise RuntimeError(
                    f"vLLM read {len(ids)} tokens, {seen} of them of images, as prompt {row}, which "
                    f"has {len(own)} and {asked}: it resized the images or changed the text, and its "
                    "completions would not be those of the policy; serve the same checkpoint with the same "
                    "preprocessor_config.json, or set use_vllm to false"
                )
        return prompts, *written


def one_token_an_image(ids: Sequence[int], token: int | None) -> list[int]:
    """A prompt in which each run of image tokens is one; between two images there is a mark."""
    return [t for at, t in enumerate(ids) if t != token or not at or ids[at - 1] != token]
