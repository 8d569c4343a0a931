"""The scripts that time parts of a step: what surrounds the kernels, types, and caches."""

import runpy
from pathlib import Path

import pytest

from batchnorm.kernels import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_part_is_timed(capsys):
    times = runpy.run_path(str(BENCHMARKS / "seam.py"))["main"](seconds=0)
    assert set(times) == {"torch.nn", "batchnorm", "a node that does nothing"}
    assert all(value > 0 for value in times.values())
    assert "a node that does nothing" in capsys.readouterr().out


@pytest.mark.skipif(native._native is None, reason="not compiled here")
def test_both_types_are_timed(capsys):
    main = runpy.run_path(str(BENCHMARKS / "halves.py"))["main"]
    main.__globals__["SHAPES"] = {"here": (8, 3), "there": (2, 3, 4, 5)}
    ratios = main(seconds=0)
    assert list(ratios) == ["here", "there"]
    assert all(ratio > 0 for pair in ratios.values() for ratio in pair)
    assert "2x3x4x5" in capsys.readouterr().out


@pytest.mark.skipif(native._native is None, reason="not compiled here")
def test_results_past_the_caches_and_through_them_are_timed(capsys):
    main = runpy.run_path(str(BENCHMARKS / "streaming.py"))["main"]
    main.__globals__.update(SHAPES=[(2, 3, 4, 5)], ALL_RESULTS=2000)
    before = native._native.cache_bytes()
    ratios = main(seconds=0)
    assert native._native.cache_bytes() == before
    assert list(ratios) == [("NCHW", "2x3x4x5"), ("NHWC", "2x3x4x5")]
    for quartiles in [q for found in ratios.values() for q in found.values()]:
        assert 0 < quartiles[0] <= quartiles[1] <= quartiles[2]
    assert "2x3x4x5" in capsys.readouterr().out
