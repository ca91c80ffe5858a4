"""Which of two is faster, and how sure that is: from samples that were taken in the same rounds.

The ratio of two is the median of the ratios of each round: what slowed a round down slowed both. Its
confidence interval is that of a median, between two of the sorted ratios, and assumes nothing about the
distribution of times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import quantile_test

CONFIDENCE = 0.99
MINIMUM_EFFECT = 0.03
LEAST_ROUNDS = 8  # fewer samples have no interval of this confidence
VERDICTS = ("faster", "slower", "same")


@dataclass(frozen=True)
class Ratio:
    """How many times as long the second takes as the first.

    low, high: the confidence interval of ratio. verdict: of the second; ``same`` is no difference at this
    resolution.
    """

    ratio: float
    low: float
    high: float
    rounds: int
    verdict: str


def compare(
    first_s: Sequence[float],
    second_s: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    minimum_effect: float = MINIMUM_EFFECT,
) -> Ratio:
    """Estimate the ratio second / first from samples of the same rounds, in the order taken.

    A difference is claimed if the interval excludes 1 and the ratio is at least ``minimum_effect`` from it.

    Raises:
        ValueError: different numbers of samples, fewer than LEAST_ROUNDS or too few for the confidence, or a
            number out of its range.
    """
    if len(first_s) != len(second_s) or len(first_s) < LEAST_ROUNDS:
        raise ValueError(
            f"{len(first_s)} and {len(second_s)} samples; both need as many, at least {LEAST_ROUNDS}"
        )
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be in [0.5, 1)")
    if not 0 <= minimum_effect < 1:
        raise ValueError(f"minimum_effect is {minimum_effect}; it must be in [0, 1)")
    logs = [math.log(b / a) for a, b in zip(first_s, second_s, strict=True)]
    interval = quantile_test(logs).confidence_interval(confidence)
    low, high = math.exp(interval.low), math.exp(interval.high)
    if math.isnan(low):
        raise ValueError(f"confidence is {confidence}; {len(logs)} rounds are too few for it")
    ratio = math.exp(statistics.median(logs))
    verdict = "same"
    if low > 1 and ratio >= 1 + minimum_effect:
        verdict = "slower"
    elif high < 1 and ratio <= 1 / (1 + minimum_effect):
        verdict = "faster"
    return Ratio(ratio, low, high, len(logs), verdict)


def geometric_mean(ratios: Sequence[float]) -> float:
    """Compute the mean of ratios that treats twice as fast and half as fast alike."""
    return math.exp(statistics.fmean(map(math.log, ratios)))
