"""What is handed to vLLM, by recorders at its boundary. In `test_vllm.py` vLLM itself is run."""

from __future__ import annotations

import importlib.util
import inspect
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from frugalpath.errors import InputError
from frugalpath.models.feature_bank import FeatureBank
from frugalpath.models.image_view import fit
from frugalpath.models.performer import QwenPerformer
from frugalpath.models.qwen_vl import backbone
from frugalpath.recipe.grpo import FrugalConfig
from frugalpath.rl.trainer import GroupTrainer
from frugalpath.rl.vllm_rollouts import BANNED, one_token_an_image
from tests.conftest import LADDER, grid_features, noise
from tests.rl.qwen import make_trainer as make_group_trainer
from tests.rl.qwen import steps
from tests.rl.recorded_vllm import CANNED, Record, count, laid_out, record_vllm

WANTED = {"use_vllm": True, "beta": 0.01}  # with a penalty the model comes from a folder
PLAIN = {"generation_kwargs": None}
MODES = ("colocate", "server")

# Parameters of TRL 1.16's methods that rl/vllm_rollouts.py calls or stands in for, `self` left out.
CALLED = {
    VLLMGeneration.generate: "prompts images num_generations profiler",
    VLLMGeneration.sync_weights: "",
    VLLMClient.generate: (
        "prompts features n repetition_penalty temperature top_p top_k min_p max_tokens logprobs "
        "structured_outputs_regex generation_kwargs"
    ),
    VLLMClient.image_features: "images max_concurrent_requests",
    VLLMGeneration.__init__: (
        "model accelerator processing_class mode structured_outputs_regex server_base_url server_host server_port "
        "server_timeout group_port tensor_parallel_size gpu_memory_utilization max_model_length max_num_seqs "
        "enable_sleep_mode model_impl trust_remote_code repetition_penalty temperature top_p top_k min_p "
        "max_completion_length logprobs generation_kwargs"
    ),
}


@pytest.fixture
def record(monkeypatch) -> Record:
    return record_vllm(monkeypatch)


@pytest.fixture(scope="module")
def seen(make_bank, image_cases) -> FeatureBank:
    """Features of the image files, for the allocator's look."""
    return make_bank({path: grid_features(3, 3, seed=i) for i, c in enumerate(image_cases) for path in c.images})


@pytest.mark.parametrize("method", CALLED, ids=lambda m: m.__qualname__)
def test_trl_still_calls_vllm_as_it_did(method):
    found = list(inspect.signature(method).parameters)[1:]
    assert found == CALLED[method].split(), (
        f"TRL's {method.__qualname__} takes {', '.join(found)}; rl/vllm_rollouts.py was written for "
        f"{CALLED[method]}: see whether it still hands over what vLLM needs, then change this list and the range of "
        "trl in pyproject.toml"
    )


def test_trl_still_leaves_the_encoder_cache_and_image_tokens_to_us():
    source = inspect.getsource(VLLMGeneration)
    assert "reset_encoder_cache" not in source, "TRL resets it now: `VLLMRollouts.sync_weights` need not"
    assert '{"prompt_token_ids": ids}' in source, (
        "TRL no longer hands prompts on as they are: see `one_token_an_image`"
    )
    assert "_place_features" in source, "TRL's server mode no longer takes prompts with all image tokens"


def test_the_extra_takes_what_this_trl_supports():
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(r) for r in extras["optional-dependencies"]["vllm"]]
    base = next(Requirement(r) for r in extras["dependencies"] if Requirement(r).name == "trl")
    assert [(r.name, r.extras, r.specifier) for r in wanted] == [("trl", {"vllm"}, base.specifier)]
    offered = [Requirement(r) for r in requires("trl") or [] if "vllm" in r]
    assert any(r.name == "vllm" and r.marker is not None and r.marker.evaluate({"extra": "vllm"}) for r in offered)


@pytest.mark.parametrize("mode", MODES)
def test_images_are_handed_over_so_that_as_many_tokens_are_counted(record, tmp_path, mode):
    trainer = make_group_trainer(GroupTrainer, str(tmp_path), vllm_mode=mode, rows="mixed", **WANTED)
    token, size = trainer.processing_class.image_token_id, trainer.processing_class.image_processor.size
    trainer.model.train()
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    own = [p.ids.tolist() for p in trainer._batch.prompts]
    handed = [prompt for prompts, _ in record.batches for prompt in prompts]
    assert {len(p["images"]) for p in handed} == {0, 1, 2}
    if mode == "colocate":
        assert len(handed) == 16, "every completion is a row"
        handed = handed[::4]
        assert all(p["ids"].count(token) == len(p["images"]) for p in handed)
        assert [laid_out(p["ids"], p["images"], token, size) for p in handed] == own
    else:
        # Requests of a batch run side by side.
        handed.sort(key=lambda p: own.index(p["ids"]))
        assert [p["ids"] for p in handed] == own
        for p in handed:
            places = p["mm_placeholders"]["image"]
            for place, image in zip(places, p["images"], strict=True):
                assert place["length"] == count(image, size)
                run = p["ids"][place["offset"] : place["offset"] + place["length"]]
                assert set(run) == {token} and p["ids"][place["offset"] + place["length"]] != token


@pytest.mark.parametrize("mode", MODES)
def test_an_image_token_is_banned_beside_what_the_recipe_asks_for(record, tmp_path, mode):
    asked = {"logit_bias": {7: 1.5}, "min_tokens": 2}
    trainer = make_group_trainer(
        GroupTrainer, str(tmp_path), vllm_mode=mode, temperature=0.7, generation_kwargs=asked, **WANTED
    )
    trainer.model.train()
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    (_, params), *_ = record.batches
    assert params["logit_bias"] == {7: 1.5, trainer.processing_class.image_token_id: BANNED}
    assert (params["min_tokens"], params["temperature"], params["max_tokens"]) == (2, 0.7, 8)
    assert asked == {"logit_bias": {7: 1.5}, "min_tokens": 2}, "the recipe's own stay as they were"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", [True, False])
def test_what_the_tower_saw_is_forgotten_when_it_is_trained(record, tmp_path, mode, frozen):
    trainer = make_group_trainer(GroupTrainer, str(tmp_path), vllm_mode=mode, freeze=frozen, max_steps=2, **WANTED)
    trainer.train()
    once = ["weights", "reset_prefix_cache", *([] if frozen else ["reset_encoder_cache"]), "generate"]
    assert record.calls == once * 2, "before each batch of rollouts, as the weights have changed"
    names = [name for name, _ in trainer.model.named_parameters()]
    assert record.weights[: len(names)] == names
    assert len(steps(trainer)) == 2
    assert all("sampling/importance_sampling_ratio/mean" in row for row in steps(trainer))


def test_adapters_of_the_vision_tower_count_as_training_it(record, tmp_path):
    for lora, trained in ((True, False), ("all-linear", True)):
        made = make_group_trainer(
            GroupTrainer, str(tmp_path), lora=lora, vllm_mode="server", use_vllm=True, max_steps=1
        )
        assert made.sight.trained == trained
        assert any(p.requires_grad for p in backbone(made.model).visual.parameters()) == trained


def test_a_server_without_the_endpoint_is_named(record, tmp_path):
    trainer = make_group_trainer(GroupTrainer, str(tmp_path), vllm_mode="server", freeze=False, **WANTED)
    trainer.vllm_generation.stock.vllm_client.session.dev = False
    with pytest.raises(RuntimeError, match=r"reset_encoder_cache answered 404: .* VLLM_SERVER_DEV_MODE=1"):
        trainer.vllm_generation.sync_weights()


def test_completions_to_another_prompt_than_ours_are_refused(record, tmp_path):
    trainer = make_group_trainer(GroupTrainer, str(tmp_path), **WANTED)
    trainer.model.train()
    record.misread = True
    with pytest.raises(RuntimeError, match=r"vLLM read \d+ tokens, \d+ of them of images, as prompt 0, which has"):
        trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def test_a_text_model_is_handed_its_prompts_as_they_are(record, tmp_path):
    trainer = make_group_trainer(GroupTrainer, str(tmp_path), text_only=True, max_steps=1, **WANTED)
    trainer.train()
    ((prompts, params),) = record.batches
    assert [p["ids"] for p in prompts[::4]] == [p.ids.tolist() for p in trainer._batch.prompts]
    assert "logit_bias" not in params and record.calls.count("reset_encoder_cache") == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_joint_step_writes_by_vllm_at_the_drawn_budgets(
    record, make_qwen, make_trainer, image_cases, seen, tmp_path, mode
):
    performer = _saved(make_qwen(), seen, tmp_path, shortest=28 * 28)
    trainer = make_trainer(performer, shown=image_cases, **PLAIN, use_vllm=True, vllm_mode=mode)
    trainer.train()
    token, size = performer.processor.image_token_id, performer.processor.image_processor.size
    drawn = set()
    for prompts, params in record.batches:
        assert params["logit_bias"] == {token: BANNED} and params["n"] == (1 if mode == "colocate" else 2)
        for prompt in prompts:
            counts = [count(image, size) for image in prompt["images"]]
            assert all(image.width % 28 == image.height % 28 == 0 for image in prompt["images"])
            assert sum(counts) <= LADDER[-1]
            drawn.add(sum(counts))
            if mode == "server":
                assert prompt["ids"].count(token) == sum(counts)
    assert len(drawn) > 2, "budgets differ"
    log = steps(trainer)
    assert len(log) == 3 and all("allocator/loss" in row for row in log)
    written = trainer._buffered_inputs[0]["completion_ids"][:, : len(CANNED)]
    assert (written == torch.tensor(CANNED)).all()


def test_budgets_below_the_limits_of_the_checkpoint_are_refused_before_vllm_starts(
    record, make_qwen, make_trainer, image_cases, seen, tmp_path
):
    performer = _saved(make_qwen(), seen, tmp_path, shortest=4 * 28 * 28)
    with pytest.raises(
        InputError, match=r"image00.png: shown with 1 tokens, .* makes 4 of them, .*shortest_edge: 784"
    ):
        make_trainer(performer, shown=image_cases, **PLAIN, use_vllm=True)
    # Without vLLM nothing resizes the image again.
    make_trainer(performer, shown=image_cases)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 3, 4, 9, 16, 64, 256])
@pytest.mark.parametrize("shape", [(112, 112), (150, 60), (30, 600), (1000, 700)])
def test_a_view_within_the_limits_is_left_alone_by_the_stock_processor(qwen, tmp_path, budget, shape):
    path = str(tmp_path / "image.png")
    noise(*shape, seed=0).save(path)
    sight = qwen.processor.sight
    sight.processor.size = {"shortest_edge": 784, "longest_edge": 784 * 256}
    view = sight.view_at(path, budget)
    sight.check_stock([view])
    rows, columns = fit(shape[1], shape[0], budget)
    assert len(view) == rows * columns == count(view.image(), sight.processor.size) <= budget
    grid = sight.processor(images=[view.image()], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert tuple(grid) == view.grid, "the processor itself, which may resize, agrees"


def test_a_model_in_memory_cannot_be_loaded_by_vllm(record, make_qwen, make_trainer, image_cases):
    with pytest.raises(InputError, match=r"vLLM loads the model from a folder .* set performer\.pretrained"):
        make_trainer(make_qwen(), shown=image_cases, **PLAIN, use_vllm=True)


def test_slide_models_are_refused_before_vllm_starts(record, make_performer, make_trainer):
    with pytest.raises(InputError, match="does not see as a SlideVisionAdapter does"):
        make_trainer(make_performer(), use_vllm=True)
    assert not record.calls


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named(make_qwen, make_trainer, image_cases, seen, tmp_path):
    performer = _saved(make_qwen(), seen, tmp_path)
    with pytest.raises(InputError, match=r"vLLM is not installed; .* pip install 'frugalpath\[vllm\]'"):
        make_trainer(performer, shown=image_cases, **PLAIN, use_vllm=True)


def test_gold_rollouts_do_not_go_with_vllm(tmp_path):
    with pytest.raises(ValueError, match="gold_rollout: vLLM has no log-probability of the gold answer"):
        FrugalConfig(output_dir=str(tmp_path), bf16=False, gold_rollout=True, use_vllm=True)


def test_images_side_by_side_stay_two():
    assert one_token_an_image([1, 9, 9, 2, 3, 9, 9, 9, 4], 9) == [1, 9, 2, 3, 9, 4]


def _saved(performer: QwenPerformer, bank, folder: Path, shortest: int = 784) -> QwenPerformer:
    """A performer as read from a folder, whose processor shows no less than `shortest` px."""
    performer.processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": 784 * 1024}
    performer.save(folder / "start")
    return QwenPerformer.load(folder / "start", bank, show_options=False)
