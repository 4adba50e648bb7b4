"""The estimate of memory: it counts what is really built, grows with what is asked, and falls with each knob."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frugalpath.doctor.fit import Place, features_held, fit, peak, phase_of, weigh
from frugalpath.doctor.jobs import Job, Sizes, jobs_of
from frugalpath.doctor.knobs import changes, turned
from frugalpath.doctor.ledger import Ledger
from frugalpath.doctor.machine import measure_cpu, speed_of
from frugalpath.doctor.speed import _update as flops_of
from frugalpath.doctor.speed import cost_of
from frugalpath.doctor.subject import Subject, known_configs, read_config
from frugalpath.doctor.tracing import DEPTH, Seen, Update, Writing, _mask, _see, _update, _writing, prepared, trace
from frugalpath.errors import InputError
from frugalpath.models.build import PerformerConfig
from frugalpath.models.cost import DecoderShape
from frugalpath.models.feature_bank import CACHE_MB, COLUMNS
from frugalpath.models.vision_tower import HELD
from frugalpath.recipe.run import parse_recipe
from tests.cli.conftest import write_recipe

TINY = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab_size": 300}
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "google/medgemma-1.5-4b-it": 4_300_079_472,
}
ADAM = "adamw_torch_fused"
UPDATE = Update(4, 64, 4 * 16, 0, Seen(16, 16), False, False, False, None, supervised=True)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of(PerformerConfig(**TINY), 24)


def recipe(tmp_path, *extra: str, **changes):
    return parse_recipe(["--config", str(write_recipe(tmp_path, tmp_path / "slides", **changes)), *extra])


def test_known_configurations_have_the_published_number_of_parameters():
    assert known_configs().keys() == PUBLISHED.keys()
    for name, count in PUBLISHED.items():
        with torch.device("meta"):
            model = Subject(read_config(name), torch.bfloat16, PerformerConfig()).build()
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_weights_are_those_of_the_model_that_is_built(lora):
    subject = Subject.of(PerformerConfig(**TINY, lora=lora), 24)
    counted = weigh(subject, (lora, None), ADAM)
    model = prepared(subject.build(), subject, lora, None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    sum(p.sum() for p in trained).backward()
    optimizer.step()
    kept = [s.nbytes for state in optimizer.state.values() for s in state.values() if s.ndim]
    assert counted.frozen + counted.trained + counted.adapters == sum(p.numel() for p in model.parameters())
    assert counted.trained + counted.adapters == sum(p.numel() for p in trained)
    assert counted.gradients_bytes == sum(p.grad.nbytes for p in trained)
    assert counted.optimizer_bytes == sum(kept)
    assert (counted.adapters > 0) == (lora is not None)


def test_ledger_counts_what_lives_and_forgets_what_is_gone():
    with Ledger() as ledger:
        ledger.mark("a")
        one = torch.zeros(100)
        view = one[:10]
        two = one + 1
        del two
        ledger.mark("b")
        three = torch.zeros(50)
    assert ledger.trace.moments["a"].peak == 800 and ledger.trace.moments["b"].peak == 600
    assert ledger.now == 600 and len(view) == 10 and len(three) == 50


@pytest.mark.slow
def test_layers_that_are_not_traced_are_added_by_the_line():
    deep = Subject.of(PerformerConfig(**{**TINY, "layers": DEPTH + 4}), 24)
    found, whole = trace(deep, UPDATE, False), _update(deep, UPDATE, False, None)
    assert found.kept == pytest.approx(whole.kept, rel=1e-3)
    for name, moment in found.moments.items():
        assert moment.peak == pytest.approx(whole.moments[name].peak, rel=1e-2), name


@pytest.mark.slow
def test_a_gemma_is_traced_at_few_layers_too():
    deep = Subject.of(PerformerConfig(**{**TINY, "layers": DEPTH + 5}, family="gemma_vl"), 24)
    writing = Writing(2, 4, 48, 16, Seen(16, 16), False, True, None)
    found, whole = trace(deep, writing, True), _writing(deep, writing, True, None)
    assert "full_attention" in deep.text.layer_types, "the cache is of full layers all the same"
    assert found.kept == pytest.approx(whole.kept, rel=1e-3)
    for name, moment in found.moments.items():
        assert moment.peak == pytest.approx(whole.moments[name].peak, rel=5e-2), name


@pytest.mark.parametrize(("family", "whole"), [("gemma_vl", True), ("qwen_vl", False)])
def test_the_mask_is_of_the_whole_row_where_image_tokens_see_each_other(family, whole):
    packed = replace(UPDATE, prefix=20, supervised=False)
    with torch.device("meta"):
        extra = _mask(Subject.of(PerformerConfig(**TINY, family=family), 24).build(), packed)
    assert extra["attention_mask"].shape == (4, 1, 64 if whole else 44, 64)
    assert extra.get("prefix_length") == (None if whole else 20)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen_vl", "gemma_vl"])
def test_first_sight_is_what_the_tower_takes(family):
    subject = Subject.of(PerformerConfig(**{**TINY, "layers": 4}, family=family), 24)
    model, count, vision = subject.build(), 3, subject.config.vision_config
    tokens, traced, real = Seen(64, 64), Ledger(), Ledger()
    with traced:
        _see(model, count, tokens, True, traced)
    with real:
        real.mark("all")
        if family == "qwen_vl":
            side = 8 * vision.spatial_merge_size
            width = 3 * vision.temporal_patch_size * vision.patch_size**2
            pixels = torch.zeros(count * side**2, width)
            model.get_image_features(pixels, torch.tensor([[1, side, side]] * count), return_dict=True)
        else:
            pixels = torch.zeros(count, 3, vision.image_size, vision.image_size)
            model.get_image_features(pixels, return_dict=True)
    peaks = traced.trace.moments["first sight"].peak, real.trace.moments["all"].peak
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)


def test_features_are_kept_as_the_families_keep_them(tmp_path):
    ladder, images = [1, 4, 16], 10

    def held(count, *words: str, **performer) -> float:
        run = recipe(tmp_path, *words, performer={**TINY, **performer}, ladder=ladder)
        return features_held(run, Subject.of(run.performer, 24), Sizes(patches=500), count)

    assert held(images, family="qwen_vl") == images * sum(ladder) * 32 * 4
    assert held(images, family="gemma_vl") == images * 64 * 32 * 4, "one grid of an image, whatever the ladder"
    assert held(images) == images * sum(ladder) * 4 * (24 + COLUMNS)
    learned = {"name": "resampler", "latents": 16, "width": 16, "layers": 1, "heads": 2}
    assert held(images, compressors=[learned]) == images * 500 * 4 * (24 + COLUMNS)
    assert held(None) == held(10**9) == CACHE_MB * 2**20
    assert held(None, family="gemma_vl") == HELD
    cache = tmp_path / "cache"
    assert held(None, "--vision_cache", str(cache), family="qwen_vl") == HELD, "of the first run"
    cache.mkdir()
    assert held(None, "--vision_cache", str(cache), family="qwen_vl") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"rows": 8, "scored": 8 * 16},
        {"length": 128},
        {"seen": Seen(48, 48)},
        {"accumulates": True},
    ],
    ids=["rows", "length", "budget", "accumulation"],
)
def test_an_update_takes_more_of_whatever_grows(subject, more):
    place, shared = Place(gpu=False), {"per_step": 1, "trains": (None, None), "optimizer": ADAM}
    before, after = (
        phase_of(subject, Job("sft", work, **shared), place).peak for work in (UPDATE, replace(UPDATE, **more))
    )
    assert after > before


@pytest.mark.slow
def test_checkpointing_keeps_less():
    deep = Subject.of(PerformerConfig(**{**TINY, "layers": 3}), 24)
    assert trace(deep, replace(UPDATE, checkpointing=True), False).kept < trace(deep, UPDATE, False).kept / 2


@pytest.mark.slow
def test_bfloat16_keeps_less():
    deep = Subject.of(PerformerConfig(**TINY), 24)
    long = replace(UPDATE, rows=16, length=128, scored=16 * 16)
    assert trace(deep, replace(long, bf16=True), False).kept < trace(deep, long, False).kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("performer", "gpu"),
    [
        (TINY, False),
        ({**TINY, "family": "qwen_vl", "lora": {"r": 2}}, True),
        ({**TINY, "layers": 5, "fusion": "cross_attention", "markers": "unique"}, False),
        ({**TINY, "compressors": [{"name": "resampler", "latents": 16, "width": 16, "layers": 1, "heads": 2}]}, True),
    ],
    ids=["slide_vlm", "qwen_vl", "cross_attention", "resampler"],
)
def test_every_family_has_all_phases(tmp_path, performer, gpu):
    run = recipe(tmp_path, performer=performer)
    subject = Subject.of(run.performer, 24)
    phases = fit(run, subject, Sizes(text=16, patches=32), Place(gpu), images=10)
    assert [p.name for p in phases] == ["sft", "generation", "grpo", "evaluation"]
    assert all(size > 0 for p in phases for size in p.parts.values()), "parts that are nought are left out"
    assert all(p.parts["optimizer"] > 0 for p in phases[:3])


@pytest.mark.slow
def test_each_knob_that_is_named_lowers_the_peak(tmp_path):
    sft = {"max_steps": 4, "per_device_train_batch_size": 32}
    run = recipe(tmp_path, performer=TINY, sft=sft, ladder=[1, 4, 64])
    subject, place, sizes = Subject.of(run.performer, 24), Place(gpu=True), Sizes(text=64)
    phases = fit(run, subject, sizes, place, 10)
    assert peak(phases).name in ("sft", "evaluation")
    knobs = turned(run, subject, sizes, place, 10, phases)
    assert knobs and all(k.saves > 0 and k.peak < peak(phases).peak for k in knobs)
    assert [k.harm for k in knobs] == sorted(k.harm for k in knobs)


def test_knobs_are_settings_that_the_recipe_takes(tmp_path):
    run = recipe(tmp_path, performer=TINY)
    for phase in ("sft", "generation", "grpo", "evaluation"):
        for change in changes(run, Place(gpu=False), phase):
            words = change.setting.split()
            extra = (
                words
                if words[0].startswith("--")
                else ["--set", *change.setting.split(" ", change.setting.count("=") - 1)]
            )
            if "FOLDER" not in words and "lora" not in change.setting:
                recipe(tmp_path, *extra, performer=TINY)


@pytest.mark.slow
def test_several_processes_divide_what_they_say(tmp_path):
    run = recipe(tmp_path, performer=TINY)
    subject = Subject.of(run.performer, 24)
    own = {
        kind: next(p for p in fit(run, subject, Sizes(), Place(True, 2, kind)) if p.name == "grpo").parts
        for kind in ("ddp", "zero2", "fsdp")
    }
    assert own["zero2"]["optimizer"] == own["ddp"]["optimizer"] / 2
    assert own["zero2"]["trained weights"] == own["ddp"]["trained weights"]
    assert own["fsdp"]["trained weights"] == own["ddp"]["trained weights"] / 2
    assert "gathered layers" in own["fsdp"] and "buckets of DDP" in own["ddp"]


def test_seconds_follow_flops(tmp_path):
    run = recipe(tmp_path, performer=TINY)
    subject = Subject.of(run.performer, 24)
    speed = speed_of("NVIDIA H100 80GB HBM3")
    assert speed is not None and speed_of("NVIDIA H100 PCIe").flops < speed.flops and speed_of("abacus") is None
    for job in jobs_of(run, subject, Sizes()):
        slow, fast = (cost_of(subject, job, speed, mfu) for mfu in (0.1, 0.4))
        assert fast.flops == slow.flops > 0 and fast.seconds <= slow.seconds
    measured = measure_cpu(size=64, seconds=0.01)
    assert measured.flops > 0 and measured.bytes > 0


def test_flops_of_an_update_are_those_of_the_cost_model():
    shape = DecoderShape(2, 32, 16, 64, 300, query_width=64)
    work = replace(UPDATE, rows=1, length=1000, scored=1000)
    # Both attend to all pairs but one half of a diagonal.
    assert flops_of(shape, work) == pytest.approx(shape.train(1000, 1000), rel=1e-3)


@pytest.mark.parametrize("family", ["qwen_vl", "gemma_vl"])
def test_seeing_is_counted(family):
    subject, speed = Subject.of(PerformerConfig(**TINY, family=family), 24), speed_of("H100")
    work = Writing(2, 4, 48, 16, Seen(16, 16), False, True, None)
    found = cost_of(subject, Job("generation", work, 1, (None, None), ADAM), speed, 0.4).flops
    shape = DecoderShape.from_config(subject.text)
    assert found > 2 * (shape.prefill(48) + 4 * shape.decode(16, 48)) * 1.01


def test_a_stage_has_the_adapters_and_defaults_that_it_is_trained_with(tmp_path):
    stages = [
        {"stage": "align", "max_steps": 4},
        {"stage": "case", "max_steps": 4, "learning_rates": {"lora": 1.0e-4}},
        {"stage": "warm_start", "max_steps": 4, "lora": None},
    ]
    run = recipe(tmp_path, performer={**TINY, "lora": {"r": 2}}, sft=stages)
    align, case, warm = jobs_of(run, Subject.of(run.performer, 24), Sizes())[:3]
    assert [job.work.lora for job in (align, case, warm)] == [None, {"r": 2}, None]
    settings = [change.setting for change in changes(run, Place(gpu=False), align.name)]
    assert f"sft.align.per_device_train_batch_size={align.work.rows // 2} " in settings[0]


def test_an_unknown_model_is_named_with_a_remedy():
    with pytest.raises(InputError, match="nobody/nothing: its configuration was not found"):
        read_config("nobody/nothing")
