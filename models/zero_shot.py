"""Classes by their descriptions: a slide belongs to the class whose prompts it resembles most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from models.retrieval import Embedder
from models.slide_text import similarity
from slides.errors import InputError


def class_vectors(embedder: Embedder, prompts: Mapping[str, Sequence[str]]) -> torch.Tensor:
    """Unit vectors (C, e): of each class the normalised mean of its prompts' (CLIP, Radford et al. 2021, 3.1.4).

    Raises:
        InputError: fewer than two classes, or a class without prompts or with an empty one.
    """
    problems = [] if len(prompts) > 1 else ["prompts: fewer than two classes; name what a slide may be"]
    for name, texts in prompts.items():
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            problems.append(f"prompts: class {name!r} needs a list of texts, none of them empty")
    if problems:
        raise InputError(problems)
    return F.normalize(torch.stack([embedder.texts(list(texts)).mean(0) for texts in prompts.values()]), dim=-1)


@torch.no_grad()
def class_probabilities(embedder: Embedder, slides: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Softmax (N, C), at the learned temperature, of slides' vectors (N, K, e) over classes (C, e)."""
    return (similarity(slides, classes) * embedder.model.scale.float().cpu()).softmax(1)
