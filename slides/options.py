"""Options of feature extraction, for the command line, YAML and code."""

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
    """How features are extracted from slides; the defaults use 5x tiles and the packaged encoder."""

    mpp: float = field(default=2.0, metadata={"help": "microns per pixel of the tiles: 2 for 5x, 0.5 for 20x"})
    tile_px: int = field(default=224, metadata={"help": "side of a tile, px"})
    cells: int = field(default=1, metadata={"help": "features per side of a tile: 1 pools it, 7 keeps a 7 x 7 map"})
    encoder: str = field(
        default=DEFAULT, metadata={"help": "efficientnet-lite0, timm:<model>, or a transformers model or folder"}
    )
    encoder_revision: str | None = field(default=None, metadata={"help": "encoder revision on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code from the encoder's repository"})
    precision: str = field(
        default="float32", metadata={"help": "encoder precision: float32; bfloat16 or float16 are faster on a GPU"}
    )
    min_tissue: float = field(default=0.1, metadata={"help": "keep tiles with at least this fraction of tissue"})
    max_tiles: int | None = field(
        default=50_000, metadata={"help": "maximum number of tiles per slide, spread evenly"}
    )
    mpp_tolerance: float = field(
        default=0.1, metadata={"help": "fraction by which a level to resample may be coarser than --mpp"}
    )
    slide_mpp: float | None = field(
        default=None, metadata={"help": "level-0 mpp of slides without a scale in the file or manifest"}
    )
    override_mpp: bool = field(
        default=False, metadata={"help": "prefer mpp from the manifest or --slide-mpp over the files'"}
    )
    stains: list[str] = field(
        default_factory=lambda: ["H&E"],
        metadata={"help": "stains to read, or `any`; slides of unknown stain are always read"},
    )
    dark_background: bool = field(
        default=False, metadata={"help": "also read fluorescence slides, where tissue is bright on a dark background"}
    )
    dtype: str = field(default="float32", metadata={"help": "type of the stored features: float32 or float16"})
    backend: str = field(default="openslide", metadata={"help": "reading library: openslide, fastslide or auto"})
    workers: int | None = field(
        default=None, metadata={"help": "reading threads; default: number of usable cores, at least 2"}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "tiles per encoder batch; default: 64 on a CPU, 256 on a GPU"}
    )
    read_timeout: float = field(default=120.0, metadata={"help": "timeout of one read, in seconds"})
    qc: bool = field(default=True, metadata={"help": "write a QC picture and GeoJSON for each slide"})
    overwrite: bool = field(default=False, metadata={"help": "replace features extracted with other options"})
    retry: bool = field(default=False, metadata={"help": "retry slides that failed before"})

    def check(self) -> None:
        """Raise one InputError that lists all invalid options."""
        problems = []
        if not plausible(self.mpp):
            problems.append(f"--mpp {self.mpp}: must be between {MIN_MPP} and {MAX_MPP:g}")
        if self.slide_mpp is not None and not plausible(self.slide_mpp):
            problems.append(f"--slide-mpp {self.slide_mpp}: must be between {MIN_MPP} and {MAX_MPP:g}")
        if not 0 <= self.min_tissue <= 1:
            problems.append(f"--min-tissue {self.min_tissue}: must be between 0 and 1")
        if not 0 <= self.mpp_tolerance <= 1:
            problems.append(f"--mpp-tolerance {self.mpp_tolerance}: must be between 0 and 1")
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
        """Return the options that determine feature values; runs with equal identity may share an output folder."""
        names = "mpp tile_px cells encoder encoder_revision min_tissue max_tiles mpp_tolerance dark_background dtype"
        values = {name: getattr(self, name) for name in names.split()}
        if self.precision != "float32":  # outputs of versions without the option stay valid
            values["precision"] = self.precision
        folder = Path(self.encoder)
        if folder.is_dir():  # a checkpoint that was trained further is another encoder
            files = sorted(file for file in folder.iterdir() if file.is_file())
            values["encoder_files"] = [[file.name, file_identity(file)] for file in files]
        return values
