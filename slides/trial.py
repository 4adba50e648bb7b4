"""Try reading feature files of other tools in a separate process.

The HDF5 library (2.0 and before) may crash or never return on a file whose attributes are damaged, and takes the
process with it. What has been read here once can be read anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

from loky.backend.context import get_context
from pebble import ProcessExpired, ProcessPool

from frugalpath.errors import InputError
from frugalpath.slides.store import read_features

PATIENCE = 600.0
"""Timeout per file in seconds, generous for slow disks."""


def try_features(paths: Iterable[str], timeout: float = PATIENCE) -> Iterator[tuple[int, int, bool] | str]:
    """Rows, width and whether the patch size is known, of each file; or its problem."""
    with ProcessPool(1, context=get_context("loky")) as pool:
        for path in paths:
            try:
                yield pool.schedule(_look, (path,), timeout=timeout).result()
            except InputError as error:
                yield str(error).removeprefix(f"{path}: ")
            except TimeoutError:
                yield f"cannot be read as HDF5 (not within {timeout:g} s); extract this slide again"
            except (ProcessExpired, BrokenProcessPool):
                yield "cannot be read as HDF5 (it crashes the library); extract this slide again"


def _look(path: str) -> tuple[int, int, bool]:
    found = read_features(path)
    return len(found), found.features.shape[1], "patch_size" in found.attrs
