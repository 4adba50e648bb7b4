"""Recorders where vLLM would stand: they keep what TRL hands over and give canned replies. They are no vLLM.

Everything between a trainer and them is TRL's own code: `VLLMGeneration` with its signature, `VLLMClient` down to the
HTTP session.
"""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

UNIT = 28
"""Side in px of a token of Qwen2.5-VL."""
CANNED = [5, 6, 7]
"""What every completion starts with; its number follows, so that no two are equal."""


def count(image: Image.Image, size: dict[str, int]) -> int:
    """Tokens that Qwen2.5-VL's image processor makes of an image under its limits `size`."""
    tall, wide = smart_resize(image.height, image.width, UNIT, size["shortest_edge"], size["longest_edge"])
    return tall * wide // UNIT**2


class Record:
    """What was handed over, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        """Names of what was asked for; of each run of weights the first alone."""
        self.weights: list[str] = []
        self.batches: list[tuple[list[dict], dict]] = []
        """Prompts (`ids`, `images`) and sampling parameters of each batch."""
        self.written = 0
        self.misread = False
        """Whether replies tell of one image token too many."""

    def note(self, call: str) -> None:
        if not self.calls or self.calls[-1] != call:
            self.calls.append(call)

    def reply(self) -> list[int]:
        self.written += 1
        return [*CANNED, 10 + self.written]


class RecordedEngine:
    """In the place of `vllm.LLM`."""

    def __init__(self, record: Record, token: int | None, size: dict[str, int] | None):
        self.record, self.token, self.size = record, token, size
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(
            model_executor=worker, reset_encoder_cache=lambda: record.note("reset_encoder_cache")
        )

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.record.note("weights")
        self.record.weights += [name for name, _ in weights]

    def reset_prefix_cache(self) -> None:
        self.record.note("reset_prefix_cache")

    def generate(self, prompts: list[dict], sampling_params: dict, use_tqdm: bool) -> list[Any]:
        self.record.note("generate")
        kept = []
        for prompt in prompts:
            shown = prompt.get("multi_modal_data", {}).get("image", [])
            kept.append({"ids": prompt["prompt_token_ids"], "images": shown if isinstance(shown, list) else [shown]})
        self.record.batches.append((kept, sampling_params))
        return [self._output(p) for p in kept]

    def _output(self, prompt: dict) -> Any:
        ids = laid_out(prompt["ids"], prompt["images"], self.token, self.size)
        ids += [self.token] if self.record.misread else []
        tokens = self.record.reply()
        logprobs = [{t: SimpleNamespace(rank=1, logprob=-2.0)} for t in tokens]
        return SimpleNamespace(prompt_token_ids=ids, outputs=[SimpleNamespace(token_ids=tokens, logprobs=logprobs)])


def laid_out(ids: list[int], images: list[Image.Image], token: int | None, size: Any) -> list[int]:
    """A prompt whose every image token is replaced by those of the next image, as vLLM's processors do."""
    counts = iter([count(image, size) for image in images])
    return [t for i in ids for t in ([i] * next(counts) if images and i == token else [i])]


class RecordedSession:
    """In the place of the HTTP session with a vLLM server."""

    def __init__(self, record: Record, size: dict[str, int] | None):
        self.record, self.size, self.dev = record, size, True

    def get(self, url: str, **kwargs: Any) -> Any:
        return _answer({"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}})

    def post(self, url: str, json: dict | None = None, **kwargs: Any) -> Any:
        path = url.split(":8000")[1]
        if path == "/v1/chat/completions/render":
            parts = [p for m in json["messages"] for p in m["content"]]  # type: ignore[index]
            images = [_image(p["image_url"]["url"]) for p in parts]
            places = [{"offset": 0, "length": count(image, self.size)} for image in images]
            return _answer({"features": {"mm_placeholders": {"image": places}, "images": images}})
        if path == "/inference/v1/generate":
            self.record.note("generate")
            features = json["features"] or {"images": [], "mm_placeholders": {"image": []}}  # type: ignore[index]
            kept = {"ids": json["token_ids"], **features}  # type: ignore[index]
            params = json["sampling_params"]  # type: ignore[index]
            self.record.batches.append(([kept], params))
            return _answer({"choices": [self._choice() for _ in range(params["n"])]})
        self.record.note(path.removeprefix("/"))
        return SimpleNamespace(status_code=200 if self.dev else 404, text="", json=lambda: {})

    def _choice(self) -> dict:
        tokens = self.record.reply()
        entries = [{"token": f"token_id:{t}", "logprob": -2.0, "top_logprobs": []} for t in tokens]
        return {"token_ids": tokens, "logprobs": {"content": entries}}


class RecordedClient(VLLMClient):
    """TRL's client over a recorded session; weights do not go through NCCL."""

    def __init__(self, record: Record, size: dict[str, int] | None):
        self.base_url, self.model = "http://recorded:8000", "recorded"
        self.session = RecordedSession(record, size)
        self.record = record

    def update_named_params(self, metadata: Any, params: Any) -> None:
        self.record.note("weights")
        self.record.weights += [name for name, _ in params]

    def reset_prefix_cache(self) -> None:
        self.record.note("reset_prefix_cache")


def record_vllm(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Put the recorders in the place of vLLM, as if it were installed."""
    record = Record()

    class Recorded(VLLMGeneration):
        def _init_vllm(self) -> None:
            processor = getattr(self.processing_class, "image_processor", None)
            size = None if processor is None else processor.size
            if self.mode == "server":
                self.vllm_client = RecordedClient(record, size)
            else:
                token = getattr(self.processing_class, "image_token_id", None)
                self.llm = RecordedEngine(record, token, size)

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Recorded)
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    monkeypatch.setattr("frugalpath.rl.vllm_rollouts.is_vllm_available", lambda: True)
    return record


def _answer(content: dict) -> Any:
    return SimpleNamespace(status_code=200, text="", json=lambda: content)


def _image(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
