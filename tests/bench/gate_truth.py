"""How often the gate promotes a challenger whose true difference is known: `python tests/bench/gate_truth.py`.

Each row is one pair of models: 2,000 test sets are drawn, and a challenger is promoted if the lower bound of its
difference is above -margin. Beside the gate's own rule stand three others, and the gate's exact probability.
Prints the table, writes it to data/reports/bench/gate_truth.json, and ends with status 1 if a row does not hold.
With `--enough` it prints something else instead: how many test images a promotion takes, by margin.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks.core import files, noninferiority, paths

CONFIDENCE = 0.95
LEVEL = round(1 - CONFIDENCE, 9)
IMAGES = (50, 200, 1000, 2000)
MARGINS = (0.0, 0.005, 0.01, 0.02)
DISCORDANCE = (0.0, 0.03, 0.1)
DRAWS = 2000
RESAMPLES = 10_000
SEED = 1998
ENOUGH_IMAGES = (200, 500, 1000, 2000, 5000)
ENOUGH_MARGINS = (0.01, 0.02, 0.05)
ENOUGH_DISCORDANCE = (0.01, 0.03, 0.1)
GOLDEN = (5**0.5 - 1) / 2
REPORT = ROOT / paths.REPORTS / "bench" / "gate_truth.json"

HEADER = (
    f"{'images':>6} {'margin':>6} {'disputed':>8} {'true':>6} {'draws':>5} | {'promoted':>8} {'exact':>7} {'level':>5} "
    f"{'holds':>5} | {'Tango':>6} {'bootstrap':>9} {'naive':>6}"
)
LEGEND = f"""\
Shares of draws in which the challenger is promoted: its difference's lower bound at {CONFIDENCE:.0%} is above -margin.

true      the challenger's top-1 minus the champion's
disputed  share of images on which just one of the two is right; where it equals the size of `true`, one never loses
promoted  of {DRAWS:,} stratified draws: each is multinomial, but together they lie evenly, so the share is near `exact`
exact     the probability of a promotion, summed over all outcomes
holds     for a challenger worse by the margin or more: neither `promoted` nor `exact` is above the level; no allowance
Tango, bootstrap, naive: the same draws judged by Tango's score bound (1998), by the paired percentile bootstrap of
          {RESAMPLES:,} resamples, and by the bare difference"""

Rule = Callable[[int, int], bool]  # wins and losses: promoted?
Row = tuple[int, float, float, float]  # images, margin, discordance, true difference
Counts = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def rows() -> list[Row]:
    """What the table covers; a discordance is at least the size of the true difference."""
    found: dict[Row, None] = {}
    for images in IMAGES:
        for margin in MARGINS:
            for true in (-2 * margin, -margin, 0.0, margin):
                for discordance in DISCORDANCE:
                    found[images, margin, max(discordance, abs(true)), true + 0.0] = None
    return list(found)


def reach(images: int, discordance: float) -> range:
    """The numbers of disputed images that occur, but for two cases in 100,000; these count as promoted."""
    from scipy import stats

    first, last = stats.binom.ppf([1e-5, 1 - 1e-5], images, discordance)
    return range(int(first), int(last) + 1)


def least_wins(images: int, margin: float, counts: list[int]) -> dict[int, int]:
    """For each number of disputed images the least wins that are promoted, by the gate's own bound.

    With each further disputed image it grows by one or not at all, as a win more never lowers the bound.
    """
    least: dict[int, int] = {}
    before, low = -1, 0
    for count in counts:
        high = low + count - before
        while low < high:
            middle = (low + high) // 2
            if noninferiority.lower_bound(middle, count - middle, images, CONFIDENCE) > -margin:
                high = middle
            else:
                low = middle + 1
        least[count], before = low, count
    return least


def exact(images: int, discordance: float, true: float, least: dict[int, int]) -> float:
    """The probability of a promotion."""
    from scipy import stats

    counts = np.array(reach(images, discordance))
    needed = np.array([least[count] for count in counts.tolist()])
    win = 0.0 if discordance == 0 else (1 + true / discordance) / 2
    weights = stats.binom.pmf(counts, images, discordance)
    return float(weights @ stats.binom.sf(needed - 1, counts, win) + max(1 - weights.sum(), 0))


@functools.cache
def bootstrap(images: int, wins: int, losses: int) -> float:
    """The lower percentile of the difference over resamples of the images."""
    random = np.random.default_rng([SEED, images, wins, losses])
    won = random.binomial(images, wins / images, RESAMPLES)
    lost = random.binomial(images - won, losses / (images - wins) if wins < images else 0.0)
    return float(np.quantile(won - lost, LEVEL)) / images


def tango(images: int, margin: float, wins: int, losses: int) -> bool:
    """Whether Tango's score bound is above -margin: his statistic there is above the normal quantile."""
    from statistics import NormalDist

    b = wins + losses + (2 * images - wins + losses) * margin
    lost = (b + (b * b - 8 * images * losses * margin * (1 + margin)) ** 0.5) / (4 * images)
    variance = images * (2 * lost - margin * (1 + margin))
    above = wins - losses + images * margin
    return above > 0 and above > NormalDist().inv_cdf(CONFIDENCE) * variance**0.5


def draw(row: int, images: int, discordance: float, true: float) -> Counts:
    """Wins and losses of DRAWS test sets, one a line.

    Stratified: each set is drawn with the multinomial's probabilities, but together they are spread evenly over them.
    """
    from scipy import stats

    shift = np.random.default_rng([SEED, row]).random(2)
    index = np.arange(DRAWS)
    disputed = stats.binom.ppf((index + shift[0]) / DRAWS, images, discordance)
    win = 0.0 if discordance == 0 else (1 + true / discordance) / 2
    wins = stats.binom.ppf((index * GOLDEN + shift[1]) % 1, disputed, win)
    return np.stack([wins, disputed - wins], axis=1).astype(np.int64)


def measure(number: int, row: Row, least: dict[int, int]) -> dict[str, Any]:
    """One row of the table; `holds` is None where the challenger is better than the margin asks."""
    images, margin, discordance, true = row
    pairs, times = np.unique(draw(number, images, discordance, true), axis=0, return_counts=True)

    def share(promoted: Rule) -> float:
        return sum(int(n) for pair, n in zip(pairs.tolist(), times, strict=True) if promoted(*pair)) / DRAWS

    promoted, probability = (
        share(lambda won, lost: won >= least.get(won + lost, 0)),
        exact(images, discordance, true, least),
    )
    return {
        "images": images,
        "margin": margin,
        "discordance": discordance,
        "true_difference": true,
        "draws": DRAWS,
        "promoted": promoted,
        "exact": probability,
        "level": LEVEL,
        "holds": (promoted <= LEVEL and probability <= LEVEL) if true <= -margin else None,
        "tango": share(lambda won, lost: tango(images, margin, won, lost)),
        "bootstrap": share(lambda won, lost: bootstrap(images, won, lost) > -margin),
        "naive": share(lambda won, lost: won - lost > -margin * images),
    }


def line(row: dict[str, Any]) -> str:
    """The row as text under HEADER."""
    holds = {True: "yes", False: "NO", None: ""}[row["holds"]]
    return (
        f"{row['images']:6} {row['margin']:6} {row['discordance']:8} {row['true_difference']:6} {row['draws']:5} | "
        f"{row['promoted']:8.2%} {row['exact']:7.2%} {row['level']:5.0%} {holds:>5} | "
        f"{row['tango']:6.1%} {row['bootstrap']:9.1%} {row['naive']:6.1%}"
    )


def least_images(margin: float) -> int:
    """The least test images with which a challenger is promoted that answers every one as the champion does."""
    low, high = 0, 1
    while noninferiority.lower_bound(0, 0, high, CONFIDENCE) <= -margin:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if noninferiority.lower_bound(0, 0, middle, CONFIDENCE) > -margin:
            high = middle
        else:
            low = middle
    return high


def enough() -> None:
    """Print by margin and test images how often a challenger is promoted that is exactly as good as the champion."""
    shares = " ".join(f"{share:>6.0%}" for share in ENOUGH_DISCORDANCE)
    print(f"How often a challenger that is as good as the champion is promoted, at {CONFIDENCE:.0%} confidence.")
    print("The last columns are for 1, 3 and 10 % of test images on which only one of the two is right.")
    print("least: the number of test images for a promotion if there are no such images.\n")
    print(f"{'margin':>6} {'least':>6} {'images':>6} | {shares}")
    for margin in ENOUGH_MARGINS:
        for images in ENOUGH_IMAGES:
            counts = {count for share in ENOUGH_DISCORDANCE for count in reach(images, share)}
            least = least_wins(images, margin, sorted(counts))
            chances = " ".join(f"{exact(images, share, 0.0, least):6.0%}" for share in ENOUGH_DISCORDANCE)
            print(f"{margin:6} {least_images(margin):6} {images:6} | {chances}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--enough", action="store_true", help="how many test images a promotion takes, by margin")
    if parser.parse_args().enough:
        enough()
        return
    table = list(enumerate(rows()))
    print(LEGEND, HEADER, sep="\n\n")
    measured = []
    for group in ((images, margin) for images in IMAGES for margin in MARGINS):
        own = [(number, row) for number, row in table if row[:2] == group]
        least = least_wins(*group, sorted({count for _, row in own for count in reach(row[0], row[2])}))
        for number, row in own:
            measured.append(measure(number, row, least))
            print(line(measured[-1]), flush=True)
    inferior = [row for row in measured if row["holds"] is not None]
    broken = sum(not row["holds"] for row in inferior)
    over = {name: sum(row[name] > LEVEL for row in inferior) for name in ("tango", "bootstrap", "naive")}
    worst = {name: max(row[name] for row in inferior) for name in ("promoted", "exact", *over)}
    files.write_json(REPORT, {"confidence": CONFIDENCE, "holds": not broken, "worst": worst, "rows": measured})
    print()
    for name, count in over.items():
        print(f"{name}: over the level in {count} of {len(inferior)} inferior rows, {worst[name]:.1%} at worst")
    print(
        f"The level of {LEVEL:.0%} {'does NOT hold' if broken else 'holds'}: over it in {broken} of {len(inferior)} "
        f"inferior rows, {worst['promoted']:.2%} at worst, {worst['exact']:.2%} by exact probability."
    )
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
