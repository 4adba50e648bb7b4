"""The estimate of memory: it counts what is really built, grows with what is asked, and falls with each knob."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.build import PerformerConfig
from rl.doctor.fit import Place, fit, peak, phase_of, weigh
from rl.doctor.jobs import Job, Sizes, jobs_of
from rl.doctor.knobs import changes, turned
from rl.doctor.ledger import Ledger
from rl.doctor.machine import measure_cpu, speed_of
from rl.doctor.speed import cost_of
from rl.doctor.subject import Subject, known_configs, read_config
from rl.doctor.tracing import DEPTH, Seen, Update, _update, prepared, trace
from rl.recipe import parse_recipe
from slides.errors import InputError
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


def test_layers_that_are_not_traced_are_added_by_the_line():
    deep = Subject.of(PerformerConfig(**{**TINY, "layers": DEPTH + 4}), 24)
    found, whole = trace(deep, UPDATE, False), _update(deep, UPDATE, False, None)
    assert found.kept == pytest.approx(whole.kept, rel=1e-3)
    for name, moment in found.moments.items():
        assert moment.peak == pytest.approx(whole.moments[name].peak, rel=1e-2), name


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


def test_checkpointing_keeps_less():
    deep = Subject.of(PerformerConfig(**{**TINY, "layers": 3}), 24)
    assert trace(deep, replace(UPDATE, checkpointing=True), False).kept < trace(deep, UPDATE, False).kept / 2


def test_bfloat16_keeps_less():
    deep = Subject.of(PerformerConfig(**TINY), 24)
    long = replace(UPDATE, rows=16, length=128, scored=16 * 16)
    assert trace(deep, replace(long, bf16=True), False).kept < trace(deep, long, False).kept


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


def test_an_unknown_model_is_named_with_a_remedy():
    with pytest.raises(InputError, match="nobody/nothing: its configuration was not found"):
        read_config("nobody/nothing")
