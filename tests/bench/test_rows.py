"""The arithmetic of a row: quartiles, ratios, the parts of copy speed."""

import pytest
from bench.small import made_up, rows_of, small_case

from batchnorm.bench.cases import BOTH
from batchnorm.bench.measure import Taken
from batchnorm.bench.rows import ratios, rows


def test_a_ratio_is_the_median_over_the_rounds_and_not_of_medians():
    theirs, own = [1.0, 10.0, 100.0], [1.0, 5.0, 10.0]  # a machine that gets slower
    assert ratios(theirs, own) == (1.5, 2.0, 6.0)
    shuffled = [10.0, 100.0, 1.0]
    assert ratios(shuffled, own)[1] == 10.0
    assert ratios(own, own) == (1.0, 1.0, 1.0)


def test_a_row():
    case = small_case((50, 10, 50, 100))  # 10 MB
    times = {"torch.nn": [0.02] * 5, "native": [0.004, 0.006, 0.005, 0.008, 0.01]}
    _, row = rows([Taken(case, times, {"torch.nn": 1e-5, "native": 1.26e-7})], {1: 1e10})
    assert row.label == "50x10x50x100 NCHW, float32, relu, forward+backward, 1 thread"
    assert (row.implementation, row.mb, row.rounds) == ("native", 10.0, 5)
    assert (row.q25_us, row.median_us, row.q75_us) == (5000, 6000, 8000)
    assert (row.ratio_q25, row.ratio, row.ratio_q75) == (2.5, 3.333, 4.0)
    assert (row.passes, row.floor) == (5, 5)
    assert row.of_copy_speed == row.of_floor == pytest.approx(5e-3 / 6e-3, rel=1e-3)
    assert row.max_error == 1.3e-7


def test_what_is_read_twice_has_a_higher_floor():
    (row,) = rows_of(made_up(small_case((100_000, 50), "NC"), torch=0.01))
    assert row.mb == 20
    assert (row.passes, row.floor) == (5, 8)
    assert (row.of_copy_speed, row.of_floor) == (1.0, 1.6)


def test_the_copy_speed_is_that_of_the_threads():
    cases = [small_case((50, 10, 50, 100), mode=BOTH, threads=n) for n in (1, 2)]
    found = rows([made_up(case, torch=0.005) for case in cases], {1: 1e10, 2: 2e10})
    assert [row.of_copy_speed for row in found] == [1.0, 0.5]
