"""The allocator that predicts the performer's score when each slide of a case has a budget of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.allocators.network import AllocatorConfig, LookNetwork
from models.allocators.shares import there
from slides.errors import InputError

WIDE = 5
"""Numbers that sum up a split without a look."""


class SplitConfig(AllocatorConfig):
    """Configuration of `SplitAllocator`.

    Args:
        slide_ladder: budgets of a slide in tokens, ascending from 0 (it is not shown); others are read between them.
        max_slides: of a case.
    """

    model_type = "frugalpath_split"

    def __init__(self, slide_ladder: Sequence[int] = (0, 1, 4, 16, 64), max_slides: int = 32, **kwargs: Any):
        self.slide_ladder, self.max_slides = list(slide_ladder), max_slides
        super().__init__(**kwargs)


class Numbers(nn.Embedding):
    """Embeddings of the numbers of slides; they tell nothing at first."""


class Said(nn.Linear):
    """What the look says; nothing at first, so that budgets and question are learnt before it."""


class Levels(nn.Embedding):
    """Embeddings of budgets: those of a ladder, and between them on a log scale.

    Args:
        ladder: budgets in tokens, ascending. width: of the embeddings.
    """

    def __init__(self, ladder: Sequence[int], width: int):
        super().__init__(len(ladder), width)
        self.ladder = list(ladder)

    def forward(self, budgets: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, width) of budgets (n,)."""
        at = torch.log2(1 + budgets.double())
        rungs = torch.log2(1 + torch.tensor(self.ladder, dtype=torch.double, device=budgets.device))
        above = torch.searchsorted(rungs, at).clamp(1, len(rungs) - 1)
        share = ((at - rungs[above - 1]) / (rungs[above] - rungs[above - 1])).clamp(0, 1).float()[:, None]
        return (1 - share) * super().forward(above - 1) + share * super().forward(above)


class SplitAllocator(LookNetwork):
    """Predicted score (as a logit) of splits: look (B, K, sum(look), d), question (B, T), budgets (B, C, K) -> (B, C).

    A slide's look, its number, its budget and the question make a token; a split is judged by its slides' tokens, in
    the mean and by attention (Ilse et al. 2018, section 2.4). Slides differ by look, number and budget alone. The
    tokens of all budgets of a slide are made once, so that many splits of a case cost little more than one. What total
    and evenness bring to a question is added in a term of its own, and looks say nothing at first: a few hundred cases
    teach the former within an epoch, and the network stops there if looks bring nothing.
    """

    config_class = SplitConfig
    config: SplitConfig

    def __init__(self, config: SplitConfig):
        super().__init__(config)
        hidden = config.width // 2
        self.slide = Said(sum(config.look) * (config.width // 4), hidden)
        self.number = Numbers(config.max_slides, hidden)
        self.budget = Levels(config.slide_ladder, hidden)
        self.asked = nn.Linear(config.width, hidden)
        self.token = nn.Sequential(nn.GELU(), nn.Dropout(config.dropout), nn.Linear(hidden, hidden), nn.GELU())
        # Attended value, value in the mean, attention score.
        self.say = nn.Linear(hidden, 2 * hidden + 1)
        self.heard = nn.Linear(config.width, hidden)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(hidden, 1))
        self.wide = nn.Linear(config.width, WIDE)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # The usual 0.02 is meant for widths in the hundreds; here it would leave every layer near zero.
        if isinstance(module, Said):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, Levels):
            nn.init.normal_(module.weight)
        elif isinstance(module, Numbers):
            nn.init.zeros_(module.weight)

    def forward(self, look: torch.Tensor, question: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of the performer's score at each split.

        Args:
            budgets: (B, C, K) tokens of each slide; those of slides that are not there have no say.

        Raises:
            InputError: a case has more slides than the allocator knows numbers.
        """
        if look.shape[1] > self.config.max_slides:
            raise InputError(
                f"a case has {look.shape[1]} slides, the allocator knows {self.config.max_slides}; raise "
                "performer.max_slides and fit it again"
            )
        seen = F.gelu(self.see(self.drop((look - self.mean) / self.std))).flatten(2)
        asked = self.question(question)
        slides = self.slide(seen) + self.number.weight[: look.shape[1]] + self.asked(asked)[:, None]
        levels, at = budgets.unique(return_inverse=True)
        said = self.say(self.token(slides[:, :, None] + self.budget(levels)))  # (B, K, levels, 2 hidden + 1)
        hidden = self.budget.embedding_dim
        index = at.transpose(1, 2)[..., None]
        values = said[..., :-1].gather(2, index.expand(-1, -1, -1, 2 * hidden))  # (B, K, C, 2 hidden)
        scores = said[..., -1:].gather(2, index)
        here = there(look)[:, :, None, None]
        attention = scores.masked_fill(~here, torch.finfo(scores.dtype).min).softmax(1)
        mean = here / here.sum(1, keepdim=True).clamp_min(1)
        gathered = (attention * values[..., :hidden] + mean * values[..., hidden:]).sum(1)
        deep = self.head(gathered + self.heard(asked)[:, None])[..., 0]
        return deep + (_summary(budgets, here[:, :, 0, 0]) @ self.wide(asked)[..., None])[..., 0]

    def flops(self, slides: int, splits: int = 1) -> float:
        """FLOPs of judging so many splits of a case of so many slides (a multiply-add counts 2)."""
        hidden, narrow = self.budget.embedding_dim, self.config.width // 4
        look = sum(self.config.look) * narrow * (self.config.feature_dim + hidden)
        tokens = len(self.config.slide_ladder) * hidden * (hidden + 2 * hidden + 1)
        asked = 2 * self.config.width * hidden
        wide = (self.config.width + splits) * WIDE
        return 2.0 * (slides * (look + tokens) + asked + wide + splits * hidden * (2 * slides + 1))


def _summary(budgets: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Splits (B, C, K) without a look, (B, C, WIDE): 1, and logs of the total and of single budgets."""
    asked = budgets.masked_fill(~here[:, None], 0).float()
    logs = torch.log2(1 + asked)
    count = here.sum(1)[:, None]
    least = logs.masked_fill(~here[:, None], torch.inf).amin(2)
    total = torch.log2(1 + asked.sum(2))
    return torch.stack([torch.ones_like(total), total, logs.sum(2) / count, least, logs.amax(2)], 2)
