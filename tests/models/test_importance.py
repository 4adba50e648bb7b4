from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from frugalpath.models.compressors.base import Tokens
from frugalpath.models.compressors.importance import ImportanceScorer

DIM, HIDDEN = 6, 10


def slides(*counts: int, seed: int = 0) -> Tokens:
    """Made-up tokens of size 1 to 3."""
    made = torch.Generator().manual_seed(seed)
    rows = [
        torch.cat([torch.randn(n, DIM + 3, generator=made), torch.randint(1, 4, (n, 1), generator=made).float()], 1)
        for n in counts
    ]
    return Tokens.from_rows(rows)


def asked(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def scorer() -> ImportanceScorer:
    torch.manual_seed(0)
    return ImportanceScorer(DIM, HIDDEN, most=9, width=16).eval()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 15), st.integers(0, 99))
def test_exactly_as_many_as_fit_are_kept_and_padding_never_instead_of_tokens(scorer, counts, budget, seed):
    tokens = slides(*counts, seed=seed)
    out = scorer(tokens, budget, asked(len(counts), seed))
    n = scorer.count(max(counts), budget)
    assert n == min(budget, 9, max(counts)) and out.size.shape == (len(counts), n)
    for row, kept, count in zip(tokens.rows(), out.rows(), counts, strict=True):
        assert len(kept) == min(n, count)
        at = [int((row == each).all(1).nonzero()[0]) for each in kept]
        assert at == sorted(set(at)), "tokens of the slide as they came, in their order"


@given(st.integers(1, 20), st.integers(1, 15), st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_tokens_and_neighbours_do_not_matter(scorer, n, budget, seed, random):
    tokens, question = slides(n, seed=seed), asked(1, seed)
    order = list(range(n))
    random.shuffle(order)
    mixed = Tokens(tokens.features[:, order], tokens.place[:, order], tokens.size[:, order])
    kept = {tuple(row.tolist()) for row in scorer(tokens, budget, question).rows()[0]}
    assert {tuple(row.tolist()) for row in scorer(mixed, budget, question).rows()[0]} == kept
    beside = Tokens.from_rows([tokens.rows()[0], slides(n + 4, seed=seed + 1).rows()[0]])
    both = scorer(beside, budget, torch.cat([question, asked(1, seed + 1)])).rows()[0]
    assert kept <= {tuple(row.tolist()) for row in both} or len(both) == len(kept)


def test_the_highest_scores_are_kept_and_ties_go_to_the_first(scorer):
    tokens, question = slides(15), asked(1)
    scores = scorer.scores(tokens, question)[0]
    best = scores.topk(4).indices.sort().values
    assert torch.equal(scorer(tokens, 4, question).features[0], tokens.features[0, best])
    deaf = ImportanceScorer(DIM, HIDDEN)
    torch.nn.init.zeros_(deaf.score[1].weight)
    assert torch.equal(deaf(tokens, 4, question).place[0], tokens.place[0, :4])


def test_the_question_decides(scorer):
    tokens = slides(20)
    kept = {tuple(scorer(tokens, 3, asked(1, seed)).place.flatten().tolist()) for seed in range(20)}
    assert len(kept) > 1
    assert scorer(tokens, 3).size.shape == (1, 3), "without a question, tokens are scored alone"


@pytest.mark.parametrize("norm", [torch.nn.Identity(), torch.nn.LayerNorm(DIM)])
def test_gradients_reach_the_scorer_also_through_a_layer_norm(scorer, norm):
    tokens, question = slides(12, 5), asked(2)
    tokens.features.requires_grad_()
    scorer.zero_grad()
    out = scorer(tokens, 4, question)
    (norm(out.features) * torch.randn(2, 4, DIM)).sum().backward()
    for name, parameter in scorer.named_parameters():
        assert parameter.grad is not None, name
        # The last bias shifts all scores alike, which a softmax does not see: what it gets is rounding.
        assert (parameter.grad.norm() > 1e-4) == (name != "score.1.bias"), name
    assert (tokens.features.grad[1, 5:] == 0).all(), "padding has no part in it"


@pytest.mark.slow
def test_it_learns_what_a_question_asks_for():
    """A question names one of four kinds; the answer is the mean content of the four tokens of that kind, of 16."""
    torch.manual_seed(0)
    scorer = ImportanceScorer(8, 4, most=4, width=32)
    read = torch.nn.Linear(8, 4)
    optimiser = torch.optim.Adam([*scorer.parameters(), *read.parameters()], lr=1e-2)

    def batch() -> tuple[Tokens, torch.Tensor, torch.Tensor]:
        kind = (torch.arange(16) % 4).expand(64, -1).gather(1, torch.rand(64, 16).argsort(1))
        wanted = torch.randint(4, (64,))
        asked_for = (kind == wanted[:, None]).float()
        content = torch.randn(64, 16, 4)
        features = torch.cat([2 * torch.eye(4)[kind], content], 2)
        tokens = Tokens(features, asked_for[..., None].expand(-1, -1, 3), torch.ones(64, 16))
        return tokens, torch.eye(4)[wanted], (asked_for[:, None] @ content)[:, 0] / 4

    found = []
    for _ in range(300):
        tokens, question, content = batch()
        kept = scorer(tokens, 4, question)
        found.append(float(kept.place.mean()))
        loss = (read(kept.features).mean(1) - content).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert found[0] < 0.4, "at random, a quarter of the kept ones is asked for"
    assert sum(found[-20:]) / 20 > 0.6


@pytest.mark.parametrize("n", [1, 30])
def test_the_formula_counts_what_torch_counts(scorer, n):
    tokens, question = slides(n), asked(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        scorer.scores(tokens, question)
    assert scorer.flops(n, 4) == counter.get_total_flops()


def test_a_budget_below_one_is_refused(scorer):
    with pytest.raises(ValueError, match="at least 1"):
        scorer(slides(3), 0)
