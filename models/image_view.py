"""An image at a budget: resized once, so that its tokens of 28 x 28 px fit the budget."""

from __future__ import annotations

from concurrent.futures import Future

import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from frugalpath.errors import InputError
from frugalpath.slides import images
from frugalpath.slides.images import ImageError, read_image


class ImageView:
    """One image at one budget.

    Args:
        source: path of the image, or the image.
        grid: (t, h, w) patches after the resize.
        merge: side of the square of patches that make one token.
        resize: whether the image is resized here; otherwise by the image processor.
        budget: tokens that were asked for, None where the processor's own limits hold.
    """

    def __init__(
        self,
        source: str | Image.Image,
        grid: tuple[int, int, int],
        merge: int,
        resize: tuple[int, int] | None,
        budget: int | None = None,
    ):
        self.source, self.grid, self.merge, self.resize, self.budget = source, grid, merge, resize, budget
        self.features: torch.Tensor | None = None
        self.key = ""
        self.job: Future | None = None

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // self.merge**2

    @property
    def tokens(self) -> int:
        """Visual tokens that it costs; all of them stand in the text."""
        return len(self)

    def __deepcopy__(self, memo: dict) -> ImageView:
        # Trainers deep-copy whole prompts; a view is never changed but for what it remembers.
        return self

    def __reduce__(self) -> tuple:
        # A trainer's log gathers prompts over processes: a description is enough there.
        name = self.source if isinstance(self.source, str) else f"image of {self.source.width}x{self.source.height} px"
        return str, (f"{name} as {len(self)} tokens",)

    def image(self) -> Image.Image:
        """The RGB image at the size of the budget."""
        if isinstance(self.source, str):
            try:
                image = read_image(self.source)
            except ImageError as error:
                raise unreadable(self.source, error) from error
        else:
            image = self.source.convert("RGB")
        return image.resize(self.resize, Image.Resampling.BICUBIC) if self.resize else image


def fit(height: int, width: int, budget: int, unit: int = 28) -> tuple[int, int]:
    """Rows and columns of tokens of an image at a budget: as many as fit, the aspect ratio kept where it can be.

    Args:
        height, width: px. budget: tokens, at least 1. unit: px of a token's side.
    """
    if budget < 1:
        raise ValueError(f"a budget of {budget} tokens: at least 1 is needed")
    # The slack outweighs rounding, which would take a row and a column from one square image in nine.
    tall, wide = smart_resize(height, width, unit, unit * unit, budget * unit * unit * (1 + 1e-9))
    rows, columns = tall // unit, wide // unit
    # A narrow image gets at least one token across, which may take it over the budget along.
    return (min(rows, budget), columns) if columns == 1 else (rows, min(columns, budget // rows))


def open_image(path: str) -> Image.Image:
    """Open an image file.

    Raises:
        InputError: there is none, or it is not an image.
    """
    try:
        return images.open_image(path)
    except ImageError as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> InputError:
    """Message for a file without an intact image."""
    return InputError(
        f"{path}: cannot be read as an image ({error.__cause__ or error}); repair or replace it, or drop its cases"
    )
