"""A world in miniature: stored features of made-up fields, questions about them, a performer of one narrow layer."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# One thread a worker, here and in every process that a test starts: how many threads share a sum decides how it is
# rounded, and workers that each take all cores slow one another down. Libraries read these when they are loaded.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = "1"
# Tests start many processes, of which each would compile the packages again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What files hold is remembered in a folder of this session. Workers have it from the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for _name, _folder in (("MPLCONFIGDIR", "matplotlib"), ("HF_HOME", "huggingface"), ("TORCH_HOME", "torch")):
        os.environ.setdefault(_name, str(_home / _folder))  # fonts and weights stay where they are
    _session = tempfile.TemporaryDirectory(prefix="frugalpath-")
    os.environ["XDG_CACHE_HOME"] = _session.name

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from packaging.version import Version
from PIL import Image

from frugalpath.envs.case import Case

# Loaded where they are used: what starts the workers needs none of them, nor do the tests of half of the packages.
if TYPE_CHECKING:
    from frugalpath.models.feature_bank import FeatureBank
    from frugalpath.models.performer import Performer, QwenPerformer
    from frugalpath.slides.store import Features

# The wall time of one example says more about the machine than about the code; what must be quick is tested by itself.
# A longer search: pytest --hypothesis-profile thorough.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("any-machine", max_examples=25, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("thorough", settings.get_profile("any-machine"), max_examples=300)
settings.load_profile("any-machine")

WIDTH = 8
"""Width of the made-up features."""
SIDE = 32
"""Pixels of one feature's square."""
LADDER = (1, 4, 16)
FINISHED = {f"tests/cli/test_{name}.py" for name in ("run", "answer", "publish")}
"""Files that look at the run `finished`."""
needs_features = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.18"),
    reason="transformers before 5.18 takes no ready features",
)


def grid_features(rows: int, columns: int, shift: float = 0.0, seed: int = 0) -> Features:
    """Features (rows * columns, WIDTH) of a field that is that many squares tall and wide; half of them shifted."""
    from frugalpath.slides.store import Features

    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:rows, :columns] * SIDE
    features = rng.normal(size=(rows * columns, WIDTH))
    features[:, : WIDTH // 2] += shift  # a shift of all would be lost on a layer norm
    return Features(
        features,
        np.stack([across.ravel(), down.ravel()], 1),
        {"patch_size": SIDE, "width": columns * SIDE, "height": rows * SIDE},
    )


@pytest.fixture(scope="session")
def make_bank(tmp_path_factory) -> Callable[..., FeatureBank]:
    """Writes fields as feature files and gives their bank: `make_bank({"name": Features}, cache_mb=...)`."""
    from frugalpath.models.feature_bank import FeatureBank
    from frugalpath.slides.store import write_features

    def make(fields: dict[str, Features], **options) -> FeatureBank:
        folder: Path = tmp_path_factory.mktemp("features")
        for name, features in fields.items():
            write_features(folder / f"{name}.h5", features)
        return FeatureBank({name: str(folder / f"{name}.h5") for name in fields}, **options)

    return make


@pytest.fixture(scope="session")
def bank(make_bank) -> FeatureBank:
    """Eight fields of 6 x 6 squares; half of the features of odd ones are shifted by 2."""
    return make_bank({f"field{i}": grid_features(6, 6, 2.0 * (i % 2), seed=i) for i in range(8)})


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    """One question a field; the answer is what the features of the field say. Prompts differ in length."""
    return [
        Case(
            id=f"case{i}",
            patient=f"patient{i // 2}",
            task="choice",
            prompt="Is this tissue normal or tumour?" + " Look well." * (i % 3),
            answer=("normal", "tumour")[i % 2],
            images=(f"field{i}",),
            options=("normal", "tumour"),
        )
        for i in range(8)
    ]


@pytest.fixture(scope="session")
def make_performer(bank, cases) -> Callable[..., Performer]:
    """Builds the performer: a new one each time, always of the same weights."""
    from frugalpath.models.build import PerformerConfig, build_performer

    def make(**changes) -> Performer:
        shape = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 32, "vocab_size": 300}
        config = PerformerConfig(**{**shape, "aligner_width": 16, "show_options": False, **changes})
        return build_performer(config, cases, bank)

    return make


@pytest.fixture
def performer(make_performer) -> Performer:
    """A new performer in eval mode."""
    made = make_performer()
    made.model.eval()
    return made


def noise(width: int, height: int, seed: int) -> Image.Image:
    """An image that no other seed has."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def image_cases(tmp_path_factory) -> list[Case]:
    """Questions about image files: prompts, sizes and numbers of images differ; one has none."""
    folder: Path = tmp_path_factory.mktemp("images")
    sizes = ([(112, 112)], [(150, 60)], [], [(84, 84), (56, 140)], [(60, 150)], [(112, 84), (112, 84), (30, 30)])
    made = []
    for i, each in enumerate(sizes):
        images = tuple(str(folder / f"image{i}{k}.png") for k in range(len(each)))
        for k, ((width, height), path) in enumerate(zip(each, images, strict=True)):
            noise(width, height, 10 * i + k).save(path)
        made.append(
            Case(
                id=f"case{i}",
                patient=f"patient{i}",
                task="choice",
                prompt="Is this tissue normal or tumour?" + " Look well." * (i % 3),
                answer=("normal", "tumour")[i % 2],
                images=images,
                options=("normal", "tumour"),
            )
        )
    return made


@pytest.fixture(scope="session")
def make_qwen(make_performer) -> Callable[..., QwenPerformer]:
    """Builds a small Qwen2.5-VL in eval mode: a new one each time, always of the same weights."""

    def make(**changes) -> QwenPerformer:
        made = make_performer(**{"family": "qwen_vl", "layers": 2, "ffn": 48, **changes})
        made.model.eval()
        return made

    return make


@pytest.fixture
def qwen(make_qwen) -> QwenPerformer:
    """A new one whose vision tower is frozen."""
    return make_qwen()


LONGEST = ("tests/launch/", "tests/cli/", "tests/benchmarks/")
"""Folders of whole runs: what takes longest begins first, so that no worker waits for another in the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def place(item: pytest.Item) -> int:
        if item.path not in slow:
            return len(LONGEST) + 1
        return next((i for i, folder in enumerate(LONGEST) if item.nodeid.startswith(folder)), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one worker, as do files whose tests share a run that takes long."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") not in ("load", "loadfile"):
        return None

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "one finished run" if file in FINISHED else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Tests draw the same numbers in whatever order they run, on one thread also where torch was loaded before."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture
def two_threads(fixed_seed: None) -> Iterator[None]:
    """What most users have: sums that are shared out over threads."""
    import torch

    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
