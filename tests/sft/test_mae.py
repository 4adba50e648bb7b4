from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import Tokens
from frugalpath.models.compressors.chain import Chain
from frugalpath.models.compressors.reconstruction import MaskedReconstruction
from frugalpath.sft.mae import mae_config, measure_mae, train_mae
from frugalpath.slides.encoder import load_encoder

TILES = Path(__file__).resolve().parents[3] / "shared/data/tiles/pcam"
DIM = 12
OPTIONS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def chain_of(dim: int = DIM, **options) -> Chain:
    return Chain(["stm", {"name": "resampler", "latents": 8, "width": 32, "heads": 4, **options}], dim, 16)


def smooth(count: int, seed: int) -> list[torch.Tensor]:
    """Prepared slides of 8 x 8 tokens whose features are of low rank: two gradients of a slide's own strengths."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(size=(3, DIM))
    down, across = (np.mgrid[:8, :8].reshape(2, -1) + 0.5) / 8
    rows = []
    for _ in range(count):
        strength = rng.normal(size=3)
        shape = np.stack([np.full(64, strength[0]), strength[1] * (across - 0.5) * 3, strength[2] * (down - 0.5) * 3])
        features = shape.T @ basis + 0.05 * rng.normal(size=(64, DIM))
        parts = [features, across[:, None], down[:, None], np.full((64, 1), 1 / 8), rng.integers(1, 4, (64, 1))]
        rows.append(torch.from_numpy(np.concatenate(parts, 1, dtype=np.float32)))
    return rows


def ready(chain: Chain, rows: list[torch.Tensor]) -> Chain:
    chain.learned[0].patches.standardise(torch.cat(rows)[:, :-4])
    return chain


@pytest.fixture
def slides() -> list[torch.Tensor]:
    return smooth(32, seed=0)


@pytest.mark.slow
def test_hidden_tokens_of_other_slides_are_told_better_than_by_any_mean(slides, tmp_path):
    chain = ready(chain_of(), slides)
    before = {k: v.clone() for k, v in chain.state_dict().items()}
    args = mae_config(tmp_path, {**OPTIONS, "max_steps": 500, "per_device_train_batch_size": 8}, seed=0)
    trainer = train_mae(chain, slides, [2, 8], args, share=0.5, decoder_width=32)
    other = smooth(12, seed=1)
    found = measure_mae(trainer.model, other, 8)
    assert found["loss"] < 0.6 * found["slide_mean"] and found["slide_mean"] < found["baseline"]
    assert found["explained"] == pytest.approx(1 - found["loss"] / found["baseline"])
    assert found == measure_mae(trainer.model, other, 8)
    assert measure_mae(trainer.model, other, 2)["explained"] > 0.3, "fewer latents were trained as well"
    moved = {k for k, v in chain.state_dict().items() if not torch.equal(v, before[k])}
    assert moved >= {k for k, v in before.items() if v.ndim > 1}, "the chain's own resampler was trained"
    assert moved.isdisjoint({k for k in before if k.endswith(("patches.mean", "patches.std"))})
    assert not any("decoder" in k for k in before)


def test_the_baseline_is_the_variance_of_the_tokens_that_are_hidden(slides):
    model = MaskedReconstruction(ready(chain_of(), slides).learned[0], 0.5, [8], 32)
    found = measure_mae(model, slides[:3], 8, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        parts = [model.reconstruct([slide], 8) for slide in slides[:3]]
    target = torch.cat([p[1][0] for p in parts]).double().detach()
    weight = torch.cat([p[2][0] for p in parts]).double()[:, None]
    mean = (target * weight).sum(0) / weight.sum()
    assert len(target) == 96 and found["tokens"] == weight.sum()
    assert found["baseline"] == pytest.approx(float(((target - mean) ** 2 * weight).sum() / weight.sum() / DIM))


def test_hidden_features_do_not_reach_the_prediction(slides):
    model = MaskedReconstruction(ready(chain_of(), slides).learned[0], 0.75, [8], 32).eval()
    torch.manual_seed(3)
    told, target, weight, _ = model.reconstruct([slides[0]], 8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    changed = slides[0].clone()
    changed[order[16:], :DIM] += 100
    torch.manual_seed(3)
    again, other, _, _ = model.reconstruct([changed], 8)
    assert torch.equal(told, again) and not torch.allclose(target, other)
    assert told.shape == (1, 48, DIM) and weight.shape == (1, 48)


@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_as_if_it_had_not(slides, tmp_path):
    def run(folder: str, steps: int, resume: str | None = None) -> Chain:
        torch.manual_seed(0)
        chain = ready(chain_of(), slides)
        options = {**OPTIONS, "max_steps": steps, "lr_scheduler_type": "constant"}
        options |= {"save_strategy": "steps", "save_steps": 4}
        train_mae(chain, slides[:10], [2, 4, 8], mae_config(tmp_path / folder, options, seed=0), resume=resume)
        return chain

    whole = run("whole", 8).state_dict()
    run("parts", 4)
    resumed = run("parts", 8, resume=str(tmp_path / "parts" / "checkpoint-4")).state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_a_slide_of_one_token_teaches_nothing_and_harms_nothing(slides):
    model = MaskedReconstruction(ready(chain_of(), slides).learned[0], 0.5, [8], 32)
    loss = model([slides[0][:1]])["loss"]
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model([slides[0][:1], slides[1]])["loss"] > 0
    with pytest.raises(InputError, match="more than one token"):
        measure_mae(model, [slides[0][:1]], 8)
    with pytest.raises(RuntimeError):
        measure_mae(model.train(), [slides[0][:, 1:]], 8)
    assert model.training


@pytest.mark.parametrize(
    ("specs", "changes", "words"),
    [
        (["stm"], {}, "name `resampler` first"),
        (["stm", "importance", "resampler"], {}, "name `resampler` first"),
        (["resampler"], {"rows": []}, "no slides"),
        (["resampler"], {"share": 1.0}, "share 1.0"),
        (["resampler"], {"ladder": [0, 4]}, "ladder"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(slides, tmp_path, specs, changes, words):
    given = {"rows": slides, "ladder": [8], "args": mae_config(tmp_path, OPTIONS, seed=0), **changes}
    with pytest.raises(InputError, match=words):
        train_mae(Chain(specs, DIM, 16), **given)


@pytest.mark.slow
@pytest.mark.skipif(not TILES.is_dir(), reason="no real tiles here")
def test_on_real_tissue_the_loss_falls_below_the_mean(tmp_path):
    """Maps of 6 x 6 features of real tiles, other tiles held out."""
    files = sorted(TILES.rglob("*.png"))[:96]
    images = [np.asarray(Image.open(file).convert("RGB").resize((192, 192))) for file in files]
    maps = load_encoder().feature_map(np.stack(images))
    side = maps.shape[1]
    down, across = (torch.from_numpy(np.mgrid[:side, :side].reshape(2, -1)) + 0.5) / side
    place = torch.stack([across, down, torch.full_like(down, 1 / side), torch.ones_like(down)], 1).float()
    chain = chain_of(maps.shape[-1], latents=16, width=64)
    rows = []
    for grid in maps.flatten(1, 2):
        pixels = torch.cat([grid, place * torch.tensor([192.0, 192.0, 192.0, 1.0])], 1)
        kept = chain.prepare(Tokens.from_rows([pixels]), 16).rows()[0]
        kept[:, -4:-1] /= 192
        rows.append(kept)
    ready(chain, rows[24:])
    args = mae_config(tmp_path, {**OPTIONS, "max_steps": 120, "per_device_train_batch_size": 12}, seed=0)
    trainer = train_mae(chain, rows[24:], [4, 16], args, share=0.5, decoder_width=64)
    found = measure_mae(trainer.model, rows[:24], 16)
    assert found["loss"] < found["baseline"]
