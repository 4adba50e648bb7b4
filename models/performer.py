"""The performer: a vision-language model that answers cases at a budget."""

from __future__ import annotations

import copy
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoTokenizer, GenerationConfig

from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.models.apportion import apportion
from frugalpath.models.compressors.base import linear_flops
from frugalpath.models.compressors.chain import Chain
from frugalpath.models.cost import DecoderShape, TowerShape
from frugalpath.models.feature_bank import FeatureBank, VisualTokens
from frugalpath.models.generation import generate_sure
from frugalpath.models.image_view import ImageView
from frugalpath.models.modes import evaluating
from frugalpath.models.processor import SlideProcessor, ViewProcessor
from frugalpath.models.qwen_vl import QwenProcessor, freeze_vision, load_qwen
from frugalpath.models.slide_config import SlideVLMConfig
from frugalpath.models.slide_vlm import SlideVLM
from frugalpath.models.vision_adapter import Prompt, VisualInput, read_prompt

Wording: TypeAlias = Callable[[Case, Sequence[VisualInput]], list[dict]]
"""Makes a conversation from a case and its visual inputs."""
UNCAPPED = 2**31
"""A budget above the tokens of any image."""
PROMPTS_KEPT = 8192
"""Number of rendered prompts that a performer caches."""


@dataclass(frozen=True)
class Answer:
    """One greedy answer and its cost.

    Args:
        text: completion, special tokens removed.
        visual: realised visual tokens.
        prompt: text tokens of the prompt.
        generated: tokens written.
        flops: of seeing, reading and writing.
        seconds: wall time of the batch divided by its rows.
        confidence: probability of these tokens in 0..1, the model's own; of one with many tokens it is small.
    """

    text: str
    visual: int
    prompt: int
    generated: int
    flops: float
    seconds: float
    confidence: float


def question_text(case: Case, show_options: bool) -> str:
    """Text of the question: the prompt and, if wanted, the options of a choice case."""
    if show_options and case.options:
        return case.prompt + "\nOptions: " + ", ".join(case.options)
    return case.prompt


class Performer(ABC):
    """A vision-language model with its processor and what its cases show.

    Args:
        bank: stored features of the cases' images and slides.
        show_options: list a choice case's options after its prompt.
        repeat_prompt: put the question twice (PathoSynVLM's prompt style "double", methods 3.3).
        system: system message, or None.
    """

    def __init__(
        self,
        model: Any,
        processor: ViewProcessor,
        bank: FeatureBank,
        show_options: bool = True,
        system: str | None = None,
        repeat_prompt: bool = False,
    ):
        self.model, self.processor, self.bank = model, processor, bank
        self.show_options, self.system, self.repeat_prompt = show_options, system, repeat_prompt
        self._wording: Wording | None = None
        self._read: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def reworded(self, wording: Wording) -> Performer:
        """Copy of the performer with other conversations about its cases; the model is shared."""
        other = copy.copy(self)
        other._wording, other._read = wording, {}
        return other

    @property
    def shape(self) -> DecoderShape:
        """Shape of the language model, for the cost formula."""
        return DecoderShape.from_config(self.model.config.get_text_config())

    @abstractmethod
    def seeing(self, views: Sequence[Any]) -> float:
        """FLOPs of turning views into tokens of the language model, beyond what is stored."""

    def flops(self, prompt: Prompt, generated: float) -> float:
        """FLOPs of seeing and reading a prompt and writing `generated` tokens."""
        return self.shape.answer(prompt.visual, prompt.text, generated) + self.seeing(prompt.views)

    @abstractmethod
    def alike(self, before: Any, after: Any) -> bool:
        """Whether two views are seen as the same."""

    @property
    def resumes(self) -> bool:
        """Whether a prompt can be read on from the KV cache of one that begins alike, see `models.reuse`."""
        return False

    @abstractmethod
    def view(self, case: Case, number: int, budget: int) -> VisualInput:
        """Visual input of a case's image or slide by number, at a budget of at least 1 token."""

    def shown(self, case: Case) -> dict[int, str]:
        """Images and slides of a case by their number; one that has no features keeps its number and is left out."""
        sources = (*case.images, *case.slides)
        return {number: source for number, source in enumerate(sources) if source not in self.bank.missing}

    def sources(self, case: Case) -> tuple[str, ...]:
        """Images and slides of a case that can be shown, in order."""
        return tuple(self.shown(case).values())

    def see(self, case: Case, budget: int) -> list[VisualInput]:
        """Views of a case at a budget, which its images and slides share evenly; one without a share is not shown."""
        shown = self.shown(case)
        if len(shown) < 2:
            return [self.view(case, number, budget) for number in shown if budget]
        shares = apportion(budget, [self.room(s) for s in shown.values()])
        return [self.view(case, number, share) for number, share in zip(shown, shares, strict=True) if share]

    def room(self, source: str) -> float:
        """Tokens that an image or slide gives at most, whatever its budget."""
        return math.inf

    @abstractmethod
    def native(self, source: str) -> int:
        """Tokens of an image or slide as it is, without any cap."""

    def messages(self, case: Case, visual: Sequence[VisualInput] = ()) -> list[dict]:
        """Conversation that puts the question; images come before the text."""
        if self._wording is not None:
            return self._wording(case, visual)
        parts: list[dict] = [{"type": "image", "image": v} for v in visual]
        # As parts, like the question: a column of a data set has one type.
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []
        question = question_text(case, self.show_options)
        parts.append({"type": "text", "text": f"{question}\n{question}" if self.repeat_prompt else question})
        return [*system, {"role": "user", "content": parts}]

    def prompt(self, case: Case, budget: int) -> Prompt:
        """The prompt of a case at a budget; it is rendered and tokenized once, however often the case is drawn."""
        views = self.see(case, budget)
        # Tokens depend on how many are shown, in what grid. The views are not kept: their features are large.
        key = (case.id, question_text(case, self.show_options), *map(_shape, views))
        if key not in self._read:
            if len(self._read) == PROMPTS_KEPT:
                del self._read[next(iter(self._read))]
            read = read_prompt(self.processor, self.processor.sight, self.messages(case, views))
            self._read[key] = read.ids, read.positions
        ids, positions = self._read[key]
        return Prompt(ids, tuple(views), positions)

    @torch.no_grad()
    def answer(
        self,
        cases: Sequence[Case],
        budgets: Sequence[int],
        max_new_tokens: int = 64,
        batch_size: int = 64,
        told: Callable[[int], object] | None = None,
    ) -> list[Answer]:
        """Greedy answers of the cases, each at its own budget; rows of like length share a batch.

        Args:
            told: called with the number of answers of each batch, for a progress bar.
        """
        order = sorted(range(len(cases)), key=lambda i: (budgets[i], len(cases[i].prompt)))
        answers: dict[int, Answer] = {}
        greedy = self.greedy(max_new_tokens)
        with evaluating(self.model):
            for at in range(0, len(order), batch_size):
                chunk = order[at : at + batch_size]
                start = time.perf_counter()
                prompts = [self.prompt(cases[i], budgets[i]) for i in chunk]
                written = generate_sure(
                    self.model,
                    self.processor.sight,
                    prompts,
                    [1] * len(chunk),
                    greedy,
                )
                seconds = (time.perf_counter() - start) / len(chunk)
                for i, prompt, (ids, logp) in zip(chunk, prompts, written, strict=True):
                    answers[i] = self.answered(prompt, ids, logp, self.flops(prompt, len(ids)), seconds)
                if told is not None:
                    told(len(chunk))
        if lost := [case.id for i, case in enumerate(cases) if i not in answers]:
            raise RuntimeError(f"no answer was written to {', '.join(lost)}")
        return [answers[i] for i in range(len(cases))]

    def greedy(self, max_new_tokens: int) -> GenerationConfig:
        """Generation settings of answers."""
        tokenizer = self.processor.tokenizer
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self.model.generation_config.eos_token_id or tokenizer.eos_token_id,
            suppress_tokens=[self.processor.image_token_id],
        )

    def answered(self, prompt: Prompt, ids: Sequence[int], logp: float, flops: float, seconds: float) -> Answer:
        """The answer to a prompt whose token ids and their log-probability are known."""
        completion = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(completion, prompt.visual, prompt.text, len(ids), flops, seconds, math.exp(logp))

    def save(self, folder: str | Path) -> None:
        """Write model (safetensors), tokenizer and processor to a folder that `load_performer` reads."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


class SlidePerformer(Performer):
    """Performer based on `SlideVLM`, which sees stored features compressed to the budget."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.config: SlideVLMConfig = self.model.config
        # Of its own: the model's goes into training wrappers. What runs outside the model has no parameters.
        hidden = self.config.text_config.hidden_size
        with torch.device("meta"):
            self.chain = Chain(self.config.compressors, self.config.feature_dim, hidden)
        self._name = json.dumps(self.config.compressors[: len(self.chain.fixed)])

    def view(self, case: Case, number: int, budget: int) -> VisualTokens:
        config = self.config
        if config.markers == "unique" and number >= config.max_slides:
            raise InputError(
                f"case {case.id}: it has {len(case.images) + len(case.slides)} slides, the performer has markers for "
                f"{config.max_slides}; raise performer.max_slides, or split the case"
            )
        tokens = self.prepared(self.shown(case)[number], budget)
        realised = self.chain.count(len(tokens.rows), budget) + config.marker_tokens
        return replace(
            tokens,
            budget=budget,
            realised=realised,
            in_text=None if config.in_text else 0,
            slide=number,
            question=self._question(case) if self.chain.asks else None,
        )

    def room(self, source: str) -> float:
        return self.chain.room(self.bank.count(source))

    def native(self, source: str) -> int:
        return self.bank.count(source)

    def prepared(self, source: str, budget: int) -> VisualTokens:
        """What the model gets of an image or slide: its tokens, or what learned compressors make them of."""
        # The latter does not hang on the budget.
        at = 0 if self.chain.learned else budget
        return self.bank.prepare(source, [at], self._name, self.chain.prepare)[0]

    def alike(self, before: VisualTokens, after: VisualTokens) -> bool:
        marked = self.config.markers == "unique" and before.slide != after.slide
        budgets = bool(self.chain.learned) and before.budget != after.budget
        asked = before.question, after.question
        questions = self.chain.asks and not (asked[0] is not None and torch.equal(asked[0], asked[1]))
        return not (marked or budgets or questions) and torch.equal(before.rows, after.rows)

    @property
    def resumes(self) -> bool:
        return self.config.in_text

    def _question(self, case: Case) -> torch.Tensor:
        text = question_text(case, self.show_options)
        return torch.tensor(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def seeing(self, views: Sequence[VisualTokens]) -> float:
        marked = len(views) * self.config.marker_tokens
        aligner = linear_flops(self.model.model.aligner, sum(v.tokens for v in views) - marked)
        return aligner + sum(self.chain.flops(len(v.rows), v.budget) for v in views)

    def flops(self, prompt: Prompt, generated: float) -> float:
        if self.config.in_text:
            return super().flops(prompt, generated)
        read = self.shape.answer(0, prompt.text, generated)
        if not prompt.views:
            return read
        looks = self.model.model.routes.flops(prompt.text + max(0.0, generated - 1), prompt.visual)
        return read + looks + self.seeing(prompt.views)

    @classmethod
    def load(cls, folder: str | Path, bank: FeatureBank, **options: Any) -> SlidePerformer:
        """Load what `save` wrote."""
        model = SlideVLM.from_pretrained(folder)
        return cls(model, SlideProcessor(AutoTokenizer.from_pretrained(folder)), bank, **options)


class ImagePerformer(Performer):
    """A model with a vision tower: it is shown the image itself, as its sight's `view_at` has it at the budget."""

    family: str
    processor: Any

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # Views remember features and patches: some hundreds of them at 1,024 tokens are a few GB.
        self._view = lru_cache(maxsize=256)(self.processor.sight.view_at)

    def view(self, case: Case, number: int, budget: int) -> VisualInput:
        return self._view(self.shown(case)[number], budget)

    def see(self, case: Case, budget: int) -> list[VisualInput]:
        if case.slides:
            raise InputError(
                f"case {case.id}: it shows slides, and {self.family} reads images; use performer.family slide_vlm, or "
                "cut fields of view from the slides"
            )
        return super().see(case, budget)

    def alike(self, before: ImageView, after: ImageView) -> bool:
        return (before.source, before.grid, before.resize) == (after.source, after.grid, after.resize)

    def native(self, source: str) -> int:
        return len(self.processor.sight.view_at(source, UNCAPPED))


class QwenPerformer(ImagePerformer):
    """Performer based on Qwen2.5-VL, which sees images resized to the budget."""

    family = "qwen_vl"
    processor: QwenProcessor

    def seeing(self, views: Sequence[VisualInput]) -> float:
        tower = TowerShape.from_config(self.model.config.vision_config)
        return sum(tower.read(v.tokens) for v in views)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        bank: FeatureBank,
        frozen: bool = True,
        dtype: torch.dtype | str = "auto",
        **options: Any,
    ) -> QwenPerformer:
        """From a folder that `save` wrote, or anything that `from_pretrained` takes.

        Args:
            frozen: leave the vision tower as it is.
            dtype: of the weights; "auto" keeps what was saved.
        """
        model = load_qwen(folder, dtype=dtype)
        if frozen:
            freeze_vision(model)
        return cls(model, QwenProcessor.load(folder), bank, **options)


def _shape(view: Any) -> tuple[int, ...]:
    return getattr(view, "grid", (len(view),))
