"""The options of an extraction, for the command line, YAML and code alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frugalpath.errors import InputError
from frugalpath.slides.encoder import DEFAULT
from frugalpath.slides.patch_encoder import PRECISIONS
from frugalpath.slides.reader import BACKENDS
from frugalpath.slides.scale import MAX_MPP, MIN_MPP, plausible
from frugalpath.slides.status import file_identity


@dataclass
class ExtractOptions:
    """How slides are turned into features; the defaults are 5x tiles through the packaged encoder."""

    mpp: float = field(default=2.0, metadata={"help": "microns per pixel of the tiles: 2 is 5x, 0.5 is 20x"})
    tile_px: int = field(default=224, metadata={"help": "side of a tile, px"})
    cells: int = field(default=1, metadata={"help": "features per side of a tile: 1 pools it, 7 keeps a 7 x 7 map"})
    encoder: str = field(
        default=DEFAULT, metadata={"help": "efficientnet-lite0, timm:<model>, or a transformers model or folder"}
    )
    encoder_revision: str | None = field(default=None, metadata={"help": "revision on the model hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "let the encoder's repository run its code"})
    precision: str = field(
        default="float32", metadata={"help": "of the encoder: float32, or bfloat16 or float16 for speed on a GPU"}
    )
    min_tissue: float = field(default=0.1, metadata={"help": "keep tiles with at least this fraction of tissue"})
    max_tiles: int | None = field(
        default=50_000, metadata={"help": "cap on the tiles of a slide; those kept are spread evenly"}
    )
    mpp_tolerance: float = field(
        default=0.1, metadata={"help": "a level may be coarser than --mpp by this fraction; it is resampled to --mpp"}
    )
    slide_mpp: float | None = field(
        default=None, metadata={"help": "level-0 mpp of the slides that record no scale and have none in the manifest"}
    )
    override_mpp: bool = field(
        default=False, metadata={"help": "let the manifest's mpp and --slide-mpp win over what the files record"}
    )
    stains: list[str] = field(
        default_factory=lambda: ["H&E"],
        metadata={"help": "stains to read; `any` reads all. A slide of unknown stain is read"},
    )
    dark_background: bool = field(
        default=False, metadata={"help": "read fluorescence too: on a dark background, bright is tissue"}
    )
    dtype: str = field(default="float32", metadata={"help": "float32 or float16, of the stored features"})
    backend: str = field(default="openslide", metadata={"help": "openslide, auto or fastslide"})
    workers: int | None = field(
        default=None, metadata={"help": "reading threads; by default as many as the process may use cores, at least 2"}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "tiles encoded at once; by default 64 on a CPU and 256 on a GPU"}
    )
    read_timeout: float = field(default=120.0, metadata={"help": "seconds that one read may take"})
    qc: bool = field(default=True, metadata={"help": "write a picture and GeoJSON of each slide"})
    overwrite: bool = field(default=False, metadata={"help": "replace features made with other options"})
    retry: bool = field(default=False, metadata={"help": "try slides again that failed before"})

    def check(self) -> None:
        """InputError with all options that cannot be."""
        problems = []
        if not plausible(self.mpp):
            problems.append(f"--mpp {self.mpp}: must lie in {MIN_MPP} to {MAX_MPP:g}")
        if self.slide_mpp is not None and not plausible(self.slide_mpp):
            problems.append(f"--slide-mpp {self.slide_mpp}: must lie in {MIN_MPP} to {MAX_MPP:g}")
        if not 0 <= self.min_tissue <= 1:
            problems.append(f"--min-tissue {self.min_tissue}: must lie in 0 to 1")
        if not 0 <= self.mpp_tolerance <= 1:
            problems.append(f"--mpp-tolerance {self.mpp_tolerance}: must lie in 0 to 1")
        for name in ("max_tiles", "workers", "batch_size", "read_timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.append(f"--{name.replace('_', '-')} {value}: must be positive")
        if self.precision not in PRECISIONS:
            problems.append(f"--precision {self.precision}: must be one of {', '.join(PRECISIONS)}")
        if self.dtype not in ("float32", "float16"):
            problems.append(f"--dtype {self.dtype}: must be float32 or float16")
        if self.backend not in BACKENDS:
            problems.append(f"--backend {self.backend}: must be one of {', '.join(BACKENDS)}")
        if not self.stains:
            problems.append("--stains: name at least one, or `any`")
        if problems:
            raise InputError(problems)

    def identity(self) -> dict[str, Any]:
        """What decides the features' values; two runs of equal identity may share an output folder."""
        names = "mpp tile_px cells encoder encoder_revision min_tissue max_tiles mpp_tolerance dark_background dtype"
        values = {name: getattr(self, name) for name in names.split()}
        if self.precision != "float32":  # outputs of versions without the option stay valid
            values["precision"] = self.precision
        folder = Path(self.encoder)
        if folder.is_dir():  # a checkpoint that was trained further is another encoder
            files = sorted(file for file in folder.iterdir() if file.is_file())
            values["encoder_files"] = [[file.name, file_identity(file)] for file in files]
        return values
