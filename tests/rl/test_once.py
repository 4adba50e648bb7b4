"""GroupTrainer takes the steps of TRL's GRPOTrainer."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from frugalpath.rl.trainer import GroupTrainer
from tests.cli.conftest import ENVIRONMENT, ROOT
from tests.conftest import needs_features
from tests.rl.qwen import Ours, Stock, Watch, assert_same, make_rows, make_trainer, steps, train

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "vespo", "luspo", "sapo")
LEVELS = [(loss, "token") for loss in LOSSES] + [("grpo", "sequence"), ("luspo", "sequence")]
OFF_POLICY = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
ALL = {**OFF_POLICY, "num_iterations": 2, "silent": 5}
"""Settings that every shortcut of the update has a part in."""


@pytest.fixture(scope="session")
def stock_logs(tmp_path_factory) -> Callable[..., list[dict[str, float]]]:
    """Logs of TRL's trainer, made once for each setting."""
    made: dict[str, list[dict[str, float]]] = {}

    def logs(**changes: Any) -> list[dict[str, float]]:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = train(Stock, str(tmp_path_factory.mktemp("stock")), **changes)
        return made[key]

    return logs


@pytest.fixture(scope="module", params=[(False, 0.0), (False, 0.05), (True, 0.0), (True, 0.05)], ids=str)
def pair(request, tmp_path_factory) -> list[tuple[Any, dict[str, Any]]]:
    """TRL's trainer and ours, each with its generation batch. Old log-probabilities are those of another policy."""
    lora, beta = request.param
    out = []
    for kind in (Stock, Ours):
        trainer = make_trainer(kind, str(tmp_path_factory.mktemp("pair")), lora=lora, beta=beta, silent=5)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        rows = [trainer.train_dataset[i] for i in range(4) for _ in range(4)]
        out.append((trainer, trainer._generate_and_score_completions(rows)))
    (_, batch), (_, own) = out
    noise = torch.randn(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(0))
    drift = 0.3 * noise * batch["completion_mask"]
    batch["old_per_token_logps"] = own["old_per_token_logps"] = log_probs(out[0])[0] + drift
    return out


def log_probs(made: tuple[Any, dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    trainer, batch = made
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    visual = {k: batch[k] for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids") if k in batch}
    if isinstance(trainer, Ours):
        trainer._batch.rows = batch["prompt_index"].tolist()
    with torch.no_grad():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=True, **visual
        )
    # What stock gives for padding is not used.
    return logps * batch["completion_mask"], entropies * batch["completion_mask"]


def test_no_loss_of_trl_is_left_out():
    told = re.findall(r"self\.loss_type (?:==|in) (.*?):\n", inspect.getsource(GRPOTrainer._compute_loss))
    assert set(re.findall(r"\"(\w+)\"", " ".join(told))) == set(LOSSES)


@pytest.mark.slow
def test_log_probabilities_are_those_of_trl(pair):
    """To 1e-5, as TRL's head sums in float32; tests/rl/test_packing.py compares logits in float64, to 1e-9."""
    (_, batch), (_, own) = pair
    for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"):
        assert torch.equal(own[key], batch[key]), key
    assert own["completion_mask"].sum(1).unique().numel() > 2, "completions differ in length"
    (logps, entropies), (own_logps, own_entropies) = map(log_probs, pair)
    assert logps.min() < -3 < logps.max() < 0.1
    assert (own_logps - logps).abs().max() < 1e-5
    assert (own_entropies - entropies).abs().max() < 1e-5
    if "ref_per_token_logps" in batch:
        assert (own["ref_per_token_logps"] - batch["ref_per_token_logps"]).abs().max() < 1e-5
        if hasattr(pair[0][0].model, "peft_config"):
            assert (batch["ref_per_token_logps"] - logps).abs().max() > 0.1, "adapters are off in the reference"


@pytest.mark.slow
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_loss_and_gradients_are_those_of_trl(pair, loss_type, level):
    losses, gradients = [], []
    flat = pair[0][1]["advantages"].view(4, 4).abs().amax(1) == 0
    assert 0 < flat.sum() < 4, "some groups teach nothing"
    for trainer, batch in pair:
        # TRL reads both where the loss is computed and nowhere else.
        trainer.loss_type, trainer.importance_sampling_level = loss_type, level
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
    stock, ours = gradients
    assert ours.keys() == stock.keys()
    whole = torch.cat([g.flatten() for g in stock.values()]).norm().item()
    assert whole > 1e-2
    for name, gradient in stock.items():
        # A bias of keys has no effect on attention, so its gradient is rounding only.
        scale = max(gradient.norm().item(), 1e-3 * whole)
        assert (ours[name] - gradient).norm().item() < 1e-5 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.05},
        {"lora": True, "beta": 0.05},
        {"lora": "all-linear", "beta": 0.05},
        {"num_iterations": 2},
        OFF_POLICY,
        {**OFF_POLICY, "gradient_accumulation_steps": 2},
        {**OFF_POLICY, "num_iterations": 2, "beta": 0.05},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "rows": "images"}
        | {"steps_per_generation": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "lora": True},
        {"freeze": False},
        {"freeze": False, "beta": 0.05, "gradient_checkpointing": True},
        {"importance_sampling_level": "sequence", "num_iterations": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "rows": "images"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "rows": "images", "silent": 5},
        # First tokens of a group have one entropy. This quantile is none of them, where rounding would choose.
        {"temperature": 0.7, "top_entropy_quantile": 0.75, "entropy_coef": 0.01},
        {"entropy_coef": 0.01, "silent": 3},
        {"scale_rewards": "batch", "silent": 3},
        {"mask_truncated_completions": True, "pad_to_multiple_of": 8},
        {"beta": 0.05, "sync_ref_model": True, "ref_model_sync_steps": 2, "use_bias_correction_kl": True},
        {"off_policy_mask_threshold": 0.001, "num_iterations": 2, "loss_type": "grpo"},
        {"attention": "eager"},
        {"text_only": True},
        {"text_only": True, "beta": 0.05, "lora": "all-linear"},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()) or "plain",
)
def test_training_takes_the_steps_of_trl(stock_logs, tmp_path, changes):
    assert_same(train(Ours, str(tmp_path), **changes), stock_logs(**changes), silent="silent" in changes)


@pytest.mark.slow
def test_the_order_of_rows_does_not_matter_within_a_step(tmp_path, monkeypatch):
    """TRL's own shuffle, which tears groups apart."""
    changes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "rows": "images"}
    monkeypatch.setattr(Stock, "whole_groups", False)
    ours, stock = (train(kind, str(tmp_path / kind.__name__), **changes) for kind in (Ours, Stock))
    # Entropy and clip ratios are means of the micro-batches' means.
    assert_same(ours, stock, silent=True)


@pytest.mark.slow
def test_equal_rows_side_by_side_are_one_prompt(tmp_path):
    """Two groups of a question that the training set has twice."""
    rows = make_rows("images").to_list()
    dataset = Dataset.from_list([rows[0], rows[0], rows[1], rows[2]], features=make_rows("images").features)
    logs = []
    for kind in (Stock, Ours):
        trainer = make_trainer(kind, str(tmp_path), dataset=dataset, shuffle_dataset=False, silent=3)
        trainer.train()
        logs.append(steps(trainer))
    assert len(trainer._batch.prompts) == 3
    assert_same(logs[1], logs[0], silent=True)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_micro_batches_do_not_matter(stock_logs, tmp_path, cut):
    """With a micro-batch of texts among them, over which stock stumbles."""
    changes = {"per_device_train_batch_size": 16 // cut, "gradient_accumulation_steps": cut, "silent": 3}
    assert_same(train(Ours, str(tmp_path), **changes), stock_logs(silent=3), silent=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "switch",
    ["shared_prefix", "see_once", "prefetch_images", "skip_zero_advantage", "reuse_old_logps", None],
)
def test_no_switch_changes_the_steps(stock_logs, tmp_path, switch):
    off = {switch: False} if switch else {}
    assert_same(train(Ours, str(tmp_path), **ALL, **off), stock_logs(**ALL), silent=switch != "skip_zero_advantage")


def marked(completions: list, completion_ids: list, **columns: Any) -> list[float]:
    """Tells equal completions apart."""
    return [sum(t % 2 == 0 for t in ids) / len(ids) + (row % 4) / 3 for row, ids in enumerate(completion_ids)]


@pytest.mark.slow
@pytest.mark.parametrize("once", [True, False])
def test_training_on_what_the_model_writes_takes_the_steps_of_trl(tmp_path, once):
    # Equal completions teach nothing: it is the penalty that moves the adapters here.
    changes = {"reward": marked, "generation_kwargs": {"do_sample": False}, "lora": True, "beta": 0.05}
    ours = train(GroupTrainer, str(tmp_path / "ours"), prefill_once=once, **changes)
    assert_same(ours, train(GRPOTrainer, str(tmp_path / "stock"), **changes))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_leaving_out_silent_groups_changes_no_step(stock_logs, tmp_path, loss_type):
    changes = {"loss_type": loss_type, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "silent": 3}
    stock = stock_logs(**changes)
    assert len({row["frac_reward_zero_std"] for row in stock}) > 2
    assert_same(train(Ours, str(tmp_path), **changes), stock, silent=True)


@pytest.mark.slow
@pytest.mark.parametrize("silent", [5, 10])
def test_weights_move_on_where_nothing_is_taught(tmp_path, silent):
    """By momentum and by weight decay."""
    trainers = [
        make_trainer(kind, str(tmp_path / kind.__name__), silent=silent, weight_decay=0.1, learning_rate=1e-2)
        for kind in (Stock, Ours)
    ]
    start = {n: p.detach().clone() for n, p in trainers[0].model.named_parameters()}
    for trainer in trainers:
        trainer.train()
    stock, ours = (dict(t.model.named_parameters()) for t in trainers)
    assert any(row["frac_reward_zero_std"] == 1 for row in steps(trainers[0]))
    assert (stock["lm_head.weight"] - start["lm_head.weight"]).abs().max() > 1e-4
    for name, weight in stock.items():
        # The gradient of a bias of keys is rounding, of which Adam makes whole steps.
        if not name.endswith("k_proj.bias"):
            assert (ours[name] - weight).norm() <= 1e-3 * (weight - start[name]).norm(), name


@pytest.mark.slow
def test_evaluation_between_the_steps_of_a_generation_changes_none(stock_logs, tmp_path):
    changes = {**OFF_POLICY, "evaluate": True, "eval_strategy": "steps", "eval_steps": 1}
    for skip in (True, False):
        ours = train(Ours, str(tmp_path), skip_eval_loss=skip, **changes)
        assert_same(ours, stock_logs(**changes))


@pytest.mark.slow
def test_bfloat16_is_close(stock_logs, tmp_path):
    """Grad norms differ by 0.3 % here, as sums in another order are rounded to 8 bits."""
    ours, stock = train(Ours, str(tmp_path), bf16=True), stock_logs(bf16=True)
    assert_same(ours, stock, rel=0.01, floor=1e-3)
    exact = stock_logs()
    assert any(a["grad_norm"] != pytest.approx(b["grad_norm"], rel=1e-3) for a, b in zip(stock, exact, strict=True))


@pytest.mark.slow
@needs_features
@pytest.mark.parametrize("kept", [None, "float32", "bfloat16"])
def test_a_cache_of_features_changes_no_step(stock_logs, tmp_path, kept):
    """Features rounded to bfloat16 move grad norms by 0.03 % here."""
    changes = {"vision_cache": str(tmp_path / "cache"), "vision_cache_dtype": kept}
    cold, warm = (make_trainer(Ours, str(tmp_path / name), **changes) for name in ("cold", "warm"))
    watches = [Watch(cold), Watch(warm)]
    cold.train()
    warm.train()
    assert watches[0].tower and not watches[1].tower
    assert_same(steps(cold), stock_logs())
    if kept != "bfloat16":
        assert_same(steps(warm), stock_logs())
        return
    assert_same(steps(warm), stock_logs(), rel=2e-3, floor=1e-5)
    assert [row["grad_norm"] for row in steps(warm)] != [row["grad_norm"] for row in steps(cold)]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_trl():
    """Among them: a process whose prompts need two forwards beside one that needs one, and groups that are torn."""
    settings = [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 8, "silent": 5},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "rows": "images", "freeze": False},
        {"per_device_train_batch_size": 6, "num_iterations": 2, "lora": True, "beta": 0.05, "rows": "images"},
        {"per_device_train_batch_size": 6, "num_iterations": 2, "silent": 3, "rows": "images", "loss_type": "bnpo"},
    ]
    launch = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "configs/accelerate/cpu.yaml"), "--main_process_port", "0"]
    script = Path(__file__).with_name("qwen.py")
    done = subprocess.run(
        [*launch, str(script), json.dumps(settings)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("LOGS ")]
    logs = json.loads(told.removeprefix("LOGS "))
    assert len(logs) == len(settings)
    for changes, run in zip(settings, logs, strict=True):
        assert_same(run["Ours"], run["Stock"], silent="silent" in changes)
