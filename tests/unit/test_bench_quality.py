"""The statistics of `tests/bench/bench_quality.py`: by hand, or by how often an interval holds the truth."""

import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # its programs import one another by their names
import bench_quality

DRAW_SEED = 0


def test_the_gap_is_the_gain_in_units_of_full_fine_tuning_s() -> None:
    share, low, high = bench_quality.gap(0.5, [0.6, 0.62, 0.64], [0.7, 0.7, 0.7])
    assert share == pytest.approx(0.6)
    # Full fine-tuning has no spread: Student's interval of the gain with two degrees of freedom, over 0.2.
    reach = 4.302653 * 0.02 / 3**0.5 / 0.2
    assert (low, high) == (pytest.approx(0.6 - reach, rel=1e-5), pytest.approx(0.6 + reach, rel=1e-5))


def test_the_interval_of_the_gap_counts_the_seeds_of_full_fine_tuning_too() -> None:
    _, low, high = bench_quality.gap(0.5, [0.62, 0.62, 0.62], [0.68, 0.7, 0.72])
    reach = 4.302653 * 0.02 / 3**0.5 * 0.12 / 0.2**2
    assert (low, high) == (pytest.approx(0.6 - reach, rel=1e-5), pytest.approx(0.6 + reach, rel=1e-5))


def test_the_interval_of_the_gap_holds_the_truth_19_times_of_20() -> None:
    draw = np.random.default_rng(DRAW_SEED)
    held = 0
    for _ in range(2000):
        tuned, full = draw.normal(0.65, 0.01, 3), draw.normal(0.75, 0.008, 3)
        _, low, high = bench_quality.gap(0.55, list(tuned), list(full))
        held += low <= 0.5 <= high
    assert 0.93 < held / 2000 < 0.98


def test_the_interval_of_a_ratio_of_deviations_holds_the_truth_and_the_ratio() -> None:
    draw = np.random.default_rng(DRAW_SEED)
    values, beside = list(draw.normal(0, 1, 20)), list(draw.normal(0, 4, 20))
    low, high = bench_quality.ratio_interval(values, beside)
    assert low < statistics.stdev(values) / statistics.stdev(beside) < high
    assert low < 0.25 < high < 1
    low, high = bench_quality.ratio_interval(values, values[::-1])
    assert low < 1 < high


def test_a_setting_keeps_its_seeds_apart_from_another_s() -> None:
    found = dict(bench_quality.by_setting({"p20-s0": 1.0, "p20-s1": 2.0, "start-scaled-s0": 3.0}))
    assert found == {"p20": [1.0, 2.0], "start-scaled": [3.0]}
