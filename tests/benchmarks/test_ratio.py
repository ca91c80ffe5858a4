"""The interval covers what it says, and a verdict needs both significance and size."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.timing import ratio


def samples(rounds: int, factor: float, seed: int, spread: float = 0.05) -> tuple[list[float], list[float]]:
    """Two candidates in rounds that now and then are slow for both, with heavy tails of their own."""
    random = np.random.default_rng(seed)
    rounds_s = 1e-3 * np.exp(random.exponential(0.5, rounds))
    first, second = (rounds_s * np.exp(spread * random.standard_t(2, rounds)) for _ in range(2))
    return first.tolist(), (factor * second).tolist()


@pytest.mark.parametrize("rounds", [8, 9, 20, 101])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(rounds: int) -> None:
    found = [ratio.compare(*samples(rounds, 1.2, seed)) for seed in range(1000)]
    assert sum(r.low <= 1.2 <= r.high for r in found) >= 985
    assert all(r.low <= r.ratio <= r.high and r.rounds == rounds for r in found)


def test_the_interval_lies_between_the_sorted_ratios_that_the_binomial_distribution_names() -> None:
    for rounds, outside in ((8, 0), (20, 3), (101, 37)):  # binom.cdf(outside, rounds, 0.5) <= 0.005
        first, second = samples(rounds, 1.2, rounds)
        ratios = sorted(b / a for a, b in zip(first, second, strict=True))
        found = ratio.compare(first, second)
        assert (found.low, found.high) == pytest.approx((ratios[outside], ratios[-1 - outside]))


def test_equal_candidates_are_the_same() -> None:
    verdicts = [ratio.compare(*samples(51, 1.0, seed)).verdict for seed in range(300)]
    assert verdicts.count("same") >= 297


def test_a_difference_is_found_in_its_direction() -> None:
    assert [ratio.compare(*samples(101, factor, 1)).verdict for factor in (1.2, 1 / 1.2)] == [
        "slower",
        "faster",
    ]


def test_a_significant_difference_below_the_minimum_effect_is_none() -> None:
    first, second = samples(101, 1.02, 0, spread=0.001)
    found = ratio.compare(first, second)
    assert found.low > 1 and found.verdict == "same"
    assert ratio.compare(first, second, minimum_effect=0.01).verdict == "slower"


def test_one_slow_round_moves_nothing() -> None:
    first, second = samples(51, 1.0, 3)
    before = ratio.compare(first, second)
    second[7] *= 1000
    assert ratio.compare(first, second).ratio == pytest.approx(before.ratio, rel=0.02)


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        ([1.0] * 7, [1.0] * 7, {}, "7 and 7 samples; both need as many, at least 8"),
        ([1.0] * 9, [1.0] * 8, {}, "9 and 8 samples"),
        ([1.0] * 9, [1.0] * 9, {"confidence": 1.0}, "confidence is 1.0"),
        ([1.0] * 8, [1.0] * 8, {"confidence": 0.999}, "confidence is 0.999; 8 rounds are too few for it"),
        ([1.0] * 9, [1.0] * 9, {"minimum_effect": -0.1}, "minimum_effect is -0.1"),
    ],
)
def test_what_cannot_be_compared_is_refused(first, second, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ratio.compare(first, second, **options)
