"""What is measured by default and on demand, and what bytes it must move."""

from itertools import pairwise

import pytest
from bench.small import small_case

from batchnorm.bench.cases import (
    BOTH,
    DTYPES,
    FORWARD,
    FUSIONS,
    INFERENCE,
    MODES,
    PLAIN,
    RELU,
    RESIDUAL,
    SHAPES,
    Wanted,
    is_large,
    plan,
)
from batchnorm.bench.errors import BenchError


def test_the_plan_has_everything_on_all_threads():
    cases = [case for case in plan(Wanted(), 2) if case.threads == 2]
    layouts = sum(2 if len(shape) == 4 else 1 for shape in SHAPES)
    assert len(cases) == len(set(cases)) == layouts * len(DTYPES) * len(FUSIONS) * len(MODES)


def test_the_plan_has_one_thread_where_that_is_quick():
    for case in plan(Wanted(), 2):
        assert case.threads == 2 or case.main or not is_large(case.problem.shape)
    assert any(case.threads == 1 and case.mode == INFERENCE for case in plan(Wanted(), 2))
    assert {case.threads for case in plan(Wanted(), 1)} == {1}


def test_problems_stand_together():
    seen = [case.problem for case in plan(Wanted(), 2)]
    changes = [a for a, b in pairwise(seen) if a != b]
    assert len(changes) + 1 == len(set(seen))


def test_peers_are_in_the_main_cases_and_compilers_where_it_pays():
    for case in plan(Wanted(), 2):
        assert ("eager" in case.peers) == (case.main and case.threads == 2)
        if case.main and case.threads == 2 and is_large(case.problem.shape):
            assert case.peers == ("eager", "compile", "jax")
    assert not any(case.peers for case in plan(Wanted(quick=True), 2))


def test_what_is_named_is_taken_at_its_word():
    wanted = Wanted.parse(
        "8x4,2x3x4x4", "bfloat16", "inference,forward", "1,all", "torch.nn,jax,eager"
    )
    cases = plan(wanted, 2)
    assert len(cases) == 3 * len(FUSIONS) * 2 * 2  # shapes and layouts, fusions, modes, threads
    assert {case.problem.dtype for case in cases} == {"bfloat16"}
    for case in cases:  # the pool of JAX has one size
        assert case.peers == (("jax", "eager") if case.threads == 2 else ("eager",))
    (only, *_) = plan(Wanted.parse(threads="3", peers="jax"), 2)
    assert only.threads == 3


def test_quick_is_a_part_of_it_and_can_be_told_more():
    cases = plan(Wanted(quick=True), 2)
    assert all(case.main and case.threads == 2 for case in cases)
    told = plan(Wanted.parse("8x4", None, "inference", None, "eager", quick=True), 2)
    assert [(c.problem.shape, c.mode, c.peers) for c in told] == [((8, 4), INFERENCE, ("eager",))]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shapes": "32"}, "--shapes: got '32', expected examples x channels"),
        ({"shapes": "8x4,8xfour"}, "--shapes: got '8xfour'"),
        ({"shapes": "8x0"}, "--shapes: got '8x0'"),
        ({"shapes": "1x2x3x4x5x6"}, "1 to 3 more sizes"),
        ({"shapes": "1x64"}, "more than one value a channel"),
        ({"shapes": ""}, "--shapes: got ''"),
        ({"dtypes": "float64"}, "--dtypes: got 'float64', expected some of float32, bfloat16"),
        ({"modes": "backward"}, "--modes: got 'backward', expected some of forward+backward"),
        ({"threads": "0"}, "--threads: got '0', expected 'all' or numbers from 1"),
        ({"peers": "numpy"}, "--peers: got 'numpy', expected some of torch.nn, eager"),
    ],
)
def test_what_is_not_known_is_said(given, words):
    with pytest.raises(BenchError) as raised:
        Wanted.parse(**given)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("mode", "fusion", "least", "twice"),
    [
        (FORWARD, PLAIN, 2, 3),
        (FORWARD, RESIDUAL, 3, 4),
        (INFERENCE, RELU, 2, 2),
        (INFERENCE, RESIDUAL, 3, 3),
        (BOTH, RELU, 5, 8),
        (BOTH, RESIDUAL, 8, 11),
    ],
)
def test_passes(mode, fusion, least, twice):
    def passes(shape, layout):
        case = small_case(shape, layout, fusion=fusion, mode=mode)
        return case.passes, case.floor

    large, small = (32, 64, 112, 112), (8, 3, 224, 224)
    assert passes(large, "NCHW") == passes(small, "NHWC") == (least, least)
    assert passes((4096, 4096), "NC") == (least, least)  # columns as wide as a cache line fit
    assert passes(large, "NHWC") == passes((64, 64, 224, 224), "NCHW") == (least, twice)


def test_what_is_read_for_a_channel():
    def mb(shape, layout, dtype="float32"):
        return small_case(shape, layout, dtype).problem.channel_mb

    assert mb((32, 64, 112, 112), "NCHW") == 32 * 112 * 112 * 4 / 1e6
    assert mb((32, 64, 112, 112), "NHWC") == 32 * 112 * 112 * 64 / 1e6
    assert mb((8, 3, 224, 224), "NHWC", "bfloat16") == 8 * 224 * 224 * 6 / 1e6  # all of it
    assert mb((4096, 4096), "NC") == 4096 * 64 / 1e6


def test_a_case_says_what_it_is():
    assert str(small_case()) == "4x3x5x5 NCHW, float32, relu, forward+backward, 1 thread"
    assert small_case().main
    assert not small_case(fusion=RELU, mode=FORWARD).main
    assert small_case(dtype="bfloat16").problem.mb == 4 * 3 * 25 * 2 / 1e6
