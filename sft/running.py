"""Run one stage of supervised training, from its keys in a recipe to a trained performer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.models.build import PerformerConfig, lora_config
from frugalpath.models.compressors.qformer import QFormer
from frugalpath.models.compressors.reconstruction import MaskedReconstruction
from frugalpath.models.performer import Performer, SlidePerformer
from frugalpath.models.sharded import whole
from frugalpath.models.slide_text import copy_qformer
from frugalpath.recipe.data import with_questions
from frugalpath.recipe.sft import Stage
from frugalpath.sft.contrastive import build_model, contrastive_config, train_contrastive
from frugalpath.sft.mae import mae_config, measure_mae, train_mae
from frugalpath.sft.supervised import adapters_of, sft_config, stage_rates, train_sft

MEASURED = 64
"""Maximum number of validation slides for measuring masked reconstruction."""


@dataclass
class Supervision:
    """Settings shared by all stages of a run.

    Args:
        train, val: cases.
        questions: kinds of question that a stage trains on unless it names others; None is all.
        ladder: budgets.
        config: configuration of the performer.
        seed: random seed.
    """

    train: Sequence[Case]
    val: Sequence[Case]
    questions: Sequence[str] | None
    ladder: Sequence[int]
    config: PerformerConfig
    seed: int

    def run(
        self,
        stage: Stage,
        performer: Performer,
        folder: Path,
        callbacks: Sequence[TrainerCallback],
        resume: str | None,
    ) -> tuple[Trainer, dict[str, Any]]:
        """Train the performer in place; return the trainer and further results of the stage.

        Args:
            folder: folder of the stage, for checkpoints and its own files.

        Raises:
            InputError: an unknown key of the stage, or a performer without the parts that it trains.
        """
        options = dict(stage.options)
        cases = with_questions(self.train, options.pop("questions", self.questions), f"sft.{stage.kind}")
        if stage.kind == "mae":
            return self._mae(options, _slides(performer, stage), cases, folder, callbacks, resume)
        if stage.kind == "contrastive":
            return self._contrastive(options, _slides(performer, stage), cases, folder, callbacks, resume)
        rates = stage_rates(stage.kind, options.pop("learning_rates", None))
        if rates is not None and "learning_rate" in options:
            raise InputError(
                f"sft.{stage.kind}: learning_rate has no effect here; give each part its own in learning_rates"
            )
        lora = adapters_of(options, rates, self.config.lora)
        options.pop("lora", None)
        # Without an image nothing is trained where the language model is frozen.
        blind = rates is not None and set(rates) == {"seeing"}
        ladder, text_only = options.pop("ladder", self.ladder), options.pop("text_only", 0.0 if blind else 0.05)
        if blind and text_only:
            raise InputError(f"sft.{stage.kind}: text_only {text_only}, but the language model is frozen; set it to 0")
        trainer = train_sft(
            performer,
            cases,
            ladder,
            sft_config(folder, options, self.seed),
            text_only,
            callbacks,
            resume,
            lora_config(replace(self.config, lora=lora), performer.model),
            rates,
        )
        return trainer, {}

    def _mae(
        self,
        options: dict,
        performer: SlidePerformer,
        cases: Sequence[Case],
        folder: Path,
        callbacks: Any,
        resume: Any,
    ) -> tuple[Trainer, dict[str, Any]]:
        chain = performer.model.model.compressor
        most = chain.learned[0].most if chain.learned else 0
        # Where another compressor follows, it is always given all latents.
        ladder = [most] if len(chain.learned) > 1 else [b for b in self.ladder if b <= most] or [most]
        own = {key: options.pop(key) for key in ("share", "decoder_width") if key in options}
        trainer = train_mae(
            chain,
            Prepared(performer, shown(performer, cases)),
            options.pop("ladder", ladder),
            mae_config(folder, options, self.seed),
            callbacks=callbacks,
            resume=resume,
            **own,
        )
        held = Prepared(performer, shown(performer, self.val))
        step = max(1, len(held) // MEASURED)
        assert isinstance(trainer.model, MaskedReconstruction)
        some = [rows for i in range(0, len(held), step) if len(rows := held[i]) > 1]
        if not some:
            whole(trainer)
            return trainer, {}
        told = measure_mae(trainer.model, some, most, self.seed)
        whole(trainer)
        if trainer.is_world_process_zero():
            print(f"masked features of {len(some)} validation slides: ", end="")
            print(", ".join(f"{name} {value:.3f}" for name, value in told.items() if name != "tokens"))
        return trainer, {"validation": {"slides": len(some), **told}}

    def _contrastive(
        self,
        options: dict,
        performer: SlidePerformer,
        cases: Sequence[Case],
        folder: Path,
        callbacks: Any,
        resume: Any,
    ) -> tuple[Trainer, dict[str, Any]]:
        target = performer.model.model.compressor.learned[0] if performer.chain.learned else None
        if performer.chain.fixed:
            raise InputError(
                "the contrastive stage trains on uncompressed patches, as a retrieval index reads them: name no "
                "compressor before `qformer`"
            )
        if not isinstance(target, QFormer):
            raise InputError(
                "the contrastive stage trains a Q-Former: name `qformer` first of the learned compressors in "
                "performer.compressors, or leave the stage out"
            )
        single = [c for c in cases if len(performer.sources(c)) == 1]
        slides = Prepared(performer, [performer.sources(c)[0] for c in single])
        spec = performer.config.compressors[len(performer.chain.fixed)]
        shape = {} if isinstance(spec, str) else {key: value for key, value in spec.items() if key != "name"}
        shape |= options.pop("model", {})
        own = {key: options.pop(key) for key in ("patches",) if key in options}
        tokenizer = performer.processor.tokenizer
        model = build_model(slides, tokenizer, shape, self.seed)
        trainer = train_contrastive(
            model,
            slides,
            [c.answer for c in single],
            tokenizer,
            contrastive_config(folder, options, self.seed),
            callbacks=callbacks,
            resume=resume,
            **own,
        )
        whole(trainer)
        copy_qformer(model.qformer, target)
        if trainer.is_world_process_zero():
            model.save_pretrained(folder / "slide_text")
            tokenizer.save_pretrained(folder / "slide_text")
        return trainer, {}


class Prepared(Sequence):
    """Input of learned compressors: lazily read rows (n, d + 4) of images and slides."""

    def __init__(self, performer: SlidePerformer, sources: Sequence[str]):
        self.performer, self.sources = performer, sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.performer.prepared(self.sources[index], 1).rows


def shown(performer: Performer, cases: Sequence[Case]) -> list[str]:
    """Distinct images and slides of cases."""
    return list(dict.fromkeys(s for c in cases for s in performer.sources(c)))


def _slides(performer: Performer, stage: Stage) -> SlidePerformer:
    if not isinstance(performer, SlidePerformer):
        raise InputError(f"sft: the stage {stage.kind} trains compressors of slides; use performer.family slide_vlm")
    return performer
