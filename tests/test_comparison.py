"""comparison: bounds against closed forms, slow computations from the definitions, every outcome of small test sets."""

import functools
import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, special, stats

from tasks.core.errors import WeighinError
from tasks.core.noninferiority import difference, lower_bound, proportion

STEP = 1e-6  # bounds are rounded outwards to it


def answers(wins: int, losses: int, images: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which images challenger and champion have right, in shuffled order; half of the others both."""
    both = (images - wins - losses) // 2
    challenger, champion = np.zeros(images, bool), np.zeros(images, bool)
    challenger[: wins + both] = True
    champion[wins : wins + both + losses] = True
    order = np.random.default_rng(images).permutation(images)
    return challenger[order], champion[order]


def outcomes(images: int) -> list[tuple[int, int]]:
    return [(wins, losses) for wins in range(images + 1) for losses in range(images + 1 - wins)]


@functools.cache
def bounds(images: int, confidence: float) -> NDArray[np.float64]:
    """The lower bound of every outcome."""
    return np.array([lower_bound(*outcome, images, confidence) for outcome in outcomes(images)])


def chances(images: int, gap: float) -> NDArray[np.float64]:
    """The probability of every outcome at a true difference of `gap`, one row per share of disputed images."""
    disputed = np.linspace(abs(gap), 1, 301)[:, None]
    won, lost = (disputed + gap) / 2, (disputed - gap) / 2
    wins, losses = np.array(outcomes(images)).T
    counts = np.stack([wins, losses, images - wins - losses])
    ways = special.gammaln(images + 1) - special.gammaln(counts + 1).sum(axis=0)
    shares = np.maximum((won, lost, 1 - won - lost), 0)
    terms = sum(special.xlogy(k, share) for k, share in zip(counts, shares, strict=True))
    return np.asarray(np.exp(ways + terms), np.float64)


def test_counts_and_difference() -> None:
    challenger = np.array([True, True, True, False, False, True, False, True])
    champion = np.array([True, False, False, True, False, True, False, True])
    found = difference(challenger, champion, 0.95)
    assert found[:4] == (8, 2, 1, 0.125)
    assert (found.lower, found.upper) == (lower_bound(2, 1, 8, 0.95), -lower_bound(1, 2, 8, 0.95))
    assert found == difference(challenger[::-1], champion[::-1], 0.95)
    assert difference(challenger[:1], champion[3:4], 0.95)[:4] == (1, 0, 0, 0.0)
    assert difference(challenger[:1], champion[2:3], 0.95)[:4] == (1, 1, 0, 1.0)


@pytest.mark.parametrize("images", [1, 2, 50, 2000, 100_000])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_closed_forms(images: int, confidence: float) -> None:
    rare = (1 - confidence) ** (1 / images)
    # No dispute: a challenger that only ever loses shows no loss with probability (1 + difference) ** images.
    assert difference(*answers(0, 0, images), confidence)[4:] == pytest.approx(
        (rare - 1, 1 - rare), abs=2 * STEP, rel=0
    )
    # All wins: the likeliest way there is that the two never agree, ((1 + difference) / 2) ** images.
    assert difference(*answers(images, 0, images), confidence)[4:] == pytest.approx(
        (2 * rare - 1, 1), abs=2 * STEP, rel=0
    )
    assert difference(*answers(0, images, images), confidence)[4:] == pytest.approx(
        (-1, 1 - 2 * rare), abs=2 * STEP, rel=0
    )


def test_no_images() -> None:
    none = np.zeros(0, bool)
    assert difference(none, none, 0.95) == (0, 0, 0, 0.0, -1.0, 1.0)
    assert proportion(0, 0, 0.95) == (0.0, 1.0)


def test_no_dispute_on_few_images_is_no_proof() -> None:
    same = np.ones(50, bool)
    assert difference(same, same, 0.95).lower < -0.05
    same = np.ones(2000, bool)
    assert -0.002 < difference(same, same, 0.95).lower < 0


def test_different_images_are_refused() -> None:
    with pytest.raises(WeighinError, match="challenger has answers for 3 images and the champion for 1,"):
        difference(np.ones(3, bool), np.ones(1, bool), 0.95)


def test_swapping_the_models_swaps_the_bounds() -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        challenger, champion = random.random((2, 300)) < random.random((2, 1))
        one, other = difference(challenger, champion, 0.95), difference(champion, challenger, 0.95)
        assert (one.images, one.wins, one.losses) == (other.images, other.losses, other.wins)
        assert (one.difference, one.lower, one.upper) == (-other.difference, -other.upper, -other.lower)
        assert one.lower < one.difference < one.upper


def test_bounds_enclose_the_difference_and_widen_with_confidence() -> None:
    wins, losses = np.array(outcomes(12)).T
    for low, high in itertools.pairwise((0.51, 0.8, 0.99)):
        assert (bounds(12, low) <= (wins - losses) / 12).all()
        assert (bounds(12, high) <= bounds(12, low)).all()


def test_a_better_outcome_never_lowers_the_bound() -> None:
    table = dict(zip(outcomes(20), bounds(20, 0.95), strict=True))
    for (wins, losses), bound in table.items():
        assert bound <= table.get((wins + 1, losses), 1)
        assert bound <= table.get((wins, losses - 1), 1)
    random = np.random.default_rng(1)
    for _ in range(15):
        images = int(random.integers(100, 3000))
        wins, losses = random.integers(1, images // 4, 2).tolist()
        bound = lower_bound(wins, losses, images, 0.95)
        assert lower_bound(wins, losses + 1, images, 0.95) <= bound <= lower_bound(wins + 1, losses, images, 0.95)


@pytest.mark.parametrize(("images", "confidence"), [(1, 0.95), (5, 0.95), (12, 0.8), (20, 0.95)])
def test_level_holds_over_every_outcome_and_no_higher_bound_would(images: int, confidence: float) -> None:
    """Checked just below and above each bound, where the chance of too high a bound is greatest."""
    found = bounds(images, confidence)
    for bound in np.unique(found[found > -1]):
        too_high = found >= bound
        assert chances(images, bound - STEP)[:, too_high].sum(axis=1).max() <= 1 - confidence + 1e-6
        assert chances(images, bound + 2 * STEP)[:, too_high].sum(axis=1).max() > 1 - confidence - 1e-3


def test_order_is_that_of_the_likelihood_ratio() -> None:
    """Against limits found by maximising the likelihood numerically."""
    images, level = 9, stats.norm.ppf(0.95)

    def fit(wins: int, losses: int, gap: float) -> float:
        def surprise(disputed: float) -> float:
            shares = ((disputed + gap) / 2, (disputed - gap) / 2, 1 - disputed)
            counts = (wins, losses, images - wins - losses)
            return -sum(float(special.xlogy(k, max(p, 0))) for k, p in zip(counts, shares, strict=True))

        ends = (abs(gap), 1.0)
        inside = optimize.minimize_scalar(surprise, bounds=ends, method="bounded", options={"xatol": 1e-10}).fun
        return -min(float(inside), *map(surprise, ends))

    def limit(wins: int, losses: int) -> float:
        best = (wins - losses) / images
        if best == -1:
            return -1.0
        target = fit(wins, losses, best) - level**2 / 2
        return float(optimize.brentq(lambda gap: max(fit(wins, losses, gap), -1e3) - target, -1 + 1e-12, best))

    limits = np.array([limit(*outcome) for outcome in outcomes(images)])
    found = bounds(images, 0.95)
    for index in np.argsort(limits):
        assert (found[limits > limits[index] + 1e-6] >= found[index]).all(), outcomes(images)[index]


def test_search_finds_the_share_that_allows_most() -> None:
    """Against a scan of 2,300 shares: the highest peak is narrow, near 87.6 % of images in dispute."""
    assert lower_bound(33, 26, 204, 0.8) == 0.001589


@pytest.mark.parametrize(
    ("outcome", "confidence", "bound"),
    [
        ((0, 0, 1), 0.75, -0.75),
        ((2, 0, 4), 0.8, 0.097572),
        ((3, 1, 9), 0.95, -0.283129),
        ((3, 1, 20), 0.8, 0.002811),
        ((17, 3, 44), 0.99, 0.083316),
        ((0, 3, 130), 0.99, -0.075204),
        ((10, 12, 200), 0.95, -0.051844),
        ((119, 116, 347), 0.6, -0.003527),  # at the third highest peak
        ((40, 60, 1000), 0.95, -0.037083),
        ((0, 27, 60), 1 - 1e-15, -0.881011),  # where the least likely counts have to be in the sum
    ],
)
def test_bound_is_to_the_millionth_what_a_scan_finds(
    outcome: tuple[int, int, int], confidence: float, bound: float
) -> None:
    """A scan of 5,600 shares, in which each number of disputed images is in the sum, found these once and for all."""
    assert lower_bound(*outcome, confidence) == bound


def test_many_images_are_near_the_normal_approximation() -> None:
    wins, losses, images = 2000, 2300, 100_000
    gap = (wins - losses) / images
    error = ((wins + losses) / images - gap**2) ** 0.5 / images**0.5
    assert (lower_bound(wins, losses, images, 0.95) - gap) / error == pytest.approx(-1.645, rel=0.02)
    assert (lower_bound(wins, losses, images, 0.99) - gap) / error == pytest.approx(-2.326, rel=0.02)


def test_proportion_is_the_exact_interval() -> None:
    for right, images in [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (943, 1000)]:
        expected = stats.binomtest(right, images).proportion_ci(0.9, method="exact")  # two-sided: 5 % on either side
        assert proportion(right, images, 0.95) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert proportion(0, 20, 0.95) == pytest.approx((0, 1 - 0.05 ** (1 / 20)))
