"""The best items: against brute force for means, in law for draws, whatever the blocks."""

from __future__ import annotations

import pytest
import torch

from probkit.errors import DataError
from probkit.models.slates import search
from probkit.models.slates.item_law import UNKNOWN, conditional_moments
from probkit.models.slates.scoring import scores
from probkit.models.slates.search import Catalogue, Followed, Known, top_drawn, top_of_means

pytestmark = pytest.mark.usefixtures("unchanged_global_state")


def catalogue(kind, items, dim=3, seed=0, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    loc = torch.randn(items + 3, dim, generator=g)
    scale = 0.05 + spread * torch.rand(items + 3, dim, generator=g)
    return Catalogue(kind, loc, scale, torch.arange(3, items + 3)), g


def nothing(users, draws, dim):
    return (
        torch.zeros(users, 0).long(),
        Known(torch.zeros(users, 0).long(), torch.zeros(users, draws, 0, dim)),
    )


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_means_against_sorting_everything(kind):
    cat, g = catalogue(kind, 40_000)
    state = torch.randn(5, 3, generator=g)
    exclude = torch.randint(3, 40_003, (5, 6), generator=g)
    cat = Catalogue(kind, cat.loc, cat.scale, cat.pool[::2].contiguous())
    found = top_of_means(cat, state, 12, exclude)
    for u in range(5):
        allowed = cat.pool[~torch.isin(cat.pool, exclude[u])]
        score = scores(kind, state[u], cat.loc[allowed].double())
        order = score.argsort(descending=True)[:12]
        assert found.ids[u].tolist() == allowed[order].tolist()
        assert torch.allclose(found.scores[u].double(), score[order], atol=1e-4)


def following(cat, rows, seed):
    """The catalogue with a draw of four groups for each row; the spread of a group varies, too."""
    g = torch.Generator().manual_seed(17)
    items, dim = cat.loc.shape
    group = torch.arange(items) % 4
    middle = torch.randn(4, dim, generator=g), 0.3 + 0.3 * torch.rand(4, dim, generator=g)
    log_scale = torch.where(torch.arange(items)[:, None] % 3 == 0, UNKNOWN, cat.scale.log())
    loc, scale = conditional_moments(cat.loc, log_scale, *(part[group] for part in middle))
    own = torch.Generator().manual_seed(seed)
    mean = middle[0] + 0.2 * torch.randn(rows, 4, dim, generator=own)
    spread = middle[1] * (0.3 * torch.randn(rows, 4, dim, generator=own)).exp()
    followed = Followed(cat.loc, log_scale, group, middle, mean, spread, 1.0)
    return Catalogue(cat.kind, loc, scale, cat.pool, followed)


def test_bounds_hold_in_every_draw_of_the_groups():
    """Means move less than is stated, and no standard deviation is larger."""
    cat, _ = catalogue("l2", 300)
    cat = following(cat, 40, 3)
    moved, widest = cat.bounds()
    for row in range(40):
        loc, scale = cat.moments(torch.full_like(cat.pool, row), cat.pool)
        assert (((loc - cat.loc[cat.pool]).norm(dim=1)) <= moved + 1e-5).all()
        assert (scale.amax(1) <= widest + 1e-6).all()


def laws(kind, exhaustive, seed, users=500, groups=False, **options):
    """Scores and ids of the best three of 1,000 items, state fixed, many draws."""
    cat, g = catalogue(kind, 1000, **options)
    cat = following(cat, users, seed) if groups else cat
    state = torch.randn(1, 1, 3, generator=g).expand(users, 1, 3)
    row = torch.arange(users)[:, None]
    exclude, known = nothing(users, 1, 3)
    return top_drawn(cat, state, row, 3, exclude, known, seed, exhaustive=exhaustive)


def gap(kind, **options):
    """Largest z of the mean scores of ranks between drawing everything and pruning."""
    full, cut = laws(kind, True, 1, **options), laws(kind, False, 2, **options)
    x, y = full.scores[:, 0].double(), cut.scores[:, 0].double()
    z = (x.mean(0) - y.mean(0)) / ((x.var(0) + y.var(0)) / len(x)).sqrt()
    ratio = (x.var(0) / y.var(0)).log() / (2 * (2 / len(x)) ** 0.5)
    count = [torch.bincount(f.ids.flatten(), minlength=1003).double() for f in (full, cut)]
    often = count[0] + count[1] > 30
    items = (count[0] - count[1])[often] / (count[0] + count[1])[often].sqrt()
    return float(z.abs().max()), float(ratio.abs().max()), max(items.abs().tolist(), default=0.0)


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_pruning_leaves_the_law_of_the_best_unchanged(kind):
    """Means and variances of the best three scores, and which items they are."""
    mean, variance, items = gap(kind)
    assert mean < 3.9  # 1e-4 two-sided, three ranks
    assert variance < 4.5  # scores are skewed, their kurtosis above that of a normal
    assert items < 4.5  # about a hundred items


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_pruning_leaves_the_law_unchanged_where_items_follow_their_groups(kind):
    assert max(gap(kind, groups=True)) < 4.5


def test_the_check_sees_bounds_that_are_too_tight(monkeypatch):
    """Groups that move more than the search believes: good draws are lost."""

    def narrow(self, ids):
        return torch.zeros(len(ids)), torch.full((len(ids),), 0.02)

    monkeypatch.setattr(Followed, "bounds", narrow)
    assert max(gap("l2", groups=True)) > 4.5


def test_the_check_sees_a_wrong_law(monkeypatch):
    """Without the tail of the noise the best scores come out too low."""
    monkeypatch.setattr(search, "_TAIL", 0.02)
    monkeypatch.setattr(search._Draw, "_tail", lambda self: torch.zeros(0).long())
    assert gap("l2")[0] > 3.9


def test_a_wide_posterior_is_searched_whole():
    """Pruning must not lose anything where every item can win, each of them seldom."""
    mean, variance, items = gap("dot", spread=4.0, users=200)
    assert max(mean, variance, items) < 4.5


@pytest.mark.parametrize("exhaustive", [True, False])
def test_blocks_do_not_matter(exhaustive, monkeypatch):
    cat, g = catalogue("l2", 5000)
    state = torch.randn(7, 4, 3, generator=g)
    row = torch.arange(28).reshape(7, 4)
    exclude = torch.randint(3, 5003, (7, 3), generator=g)
    known = Known(torch.randint(3, 5003, (7, 2), generator=g), torch.randn(7, 4, 2, 3, generator=g))
    whole = top_drawn(cat, state, row, 5, exclude, known, 3, exhaustive=exhaustive)
    monkeypatch.setattr(search, "_BLOCK", 1)
    apart = top_drawn(cat, state, row, 5, exclude, known, 3, exhaustive=exhaustive)
    assert torch.equal(whole.ids, apart.ids)
    assert torch.allclose(whole.scores, apart.scores, atol=1e-5)
    one = top_drawn(
        cat,
        state[4:5],
        row[4:5],
        5,
        exclude[4:5],
        Known(known.ids[4:5], known.vectors[4:5]),
        3,
        exhaustive=exhaustive,
    )
    assert torch.equal(one.ids[0], whole.ids[4])


@pytest.mark.parametrize("exhaustive", [True, False])
def test_given_vectors_are_used_and_exclusions_kept(exhaustive):
    cat, _ = catalogue("l2", 5000)
    state = torch.zeros(2, 3, 3)
    row = torch.arange(6).reshape(2, 3)
    ids = torch.tensor([[100, 200, 0], [100, 200, 300]])
    vectors = torch.zeros(2, 3, 3, 3)
    vectors[:, :, 1] = 1e-4
    exclude = torch.tensor([[200], [0]])
    found = top_drawn(cat, state, row, 2, exclude, Known(ids, vectors), 0, exhaustive=exhaustive)
    assert found.ids[0, :, 0].tolist() == [100] * 3
    assert not (found.ids[0] == 200).any()
    assert {100, 300} == set(found.ids[1].flatten().tolist())  # Both lie at the state itself.


def test_too_few_candidates():
    cat, _ = catalogue("l2", 5)
    state = torch.zeros(1, 3)
    with pytest.raises(DataError, match="size=6 with 5 candidates"):
        top_of_means(cat, state, 6, torch.zeros(1, 0).long())
    with pytest.raises(DataError, match="5 candidates, 1 of them excluded"):
        top_of_means(cat, state, 5, torch.tensor([[3, 3]]))
