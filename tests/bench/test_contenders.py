"""Everybody computes the same: what the check lets through, in every mode, type and layout."""

import os

import pytest
from bench.small import small_case

import batchnorm as bn
from batchnorm.bench.cases import BOTH, DTYPES, FUSIONS, MODES, PEERS, RELU
from batchnorm.bench.check import check
from batchnorm.bench.contenders import BASE, GHOST, MAPPED, NATIVE, contenders
from batchnorm.bench.contenders import PEERS as BY_NAME
from batchnorm.bench.errors import BenchError
from batchnorm.bench.problem import pose

COMPILED, JITTED = BY_NAME["compile"], BY_NAME["jax"]
SHAPES = [((16, 5), "NC"), ((4, 3, 7, 5), "NCHW"), ((4, 3, 7, 5), "NHWC")]


def agree(contender, case):
    if reason := contender.missing():
        pytest.skip(reason)
    posed = pose(case.problem, [case.mode])
    step = contender.step(case, posed)
    for _ in range(2):  # it returns the same each time
        found = step.read(step.call())
        answers = step.answers or posed.answers[case.mode]
        check(contender.name, contender.ours, case.problem, found, answers)
        assert found[0].dtype == posed.x.dtype
        assert len(found) == (1 if case.mode != BOTH else 4 + (posed.residual is not None))


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contender", [BASE, NATIVE, BY_NAME["eager"]], ids=lambda c: c.name)
def test_torch_and_ours(contender, shape, layout, dtype, fusion, mode):
    agree(contender, small_case(shape, layout, dtype, fusion, mode))


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_alone(shape, layout, dtype):
    agree(MAPPED, small_case(shape, layout, dtype))


@pytest.mark.parametrize(("shape", "layout"), [((40, 5), "NC"), ((36, 3, 7, 5), "NHWC")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ghost_batches(shape, layout, dtype):
    case = small_case(shape, layout, dtype)
    assert GHOST in contenders(case)
    agree(GHOST, case)


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_jax(shape, layout, fusion, mode):
    agree(JITTED, small_case(shape, layout, "float32", fusion, mode))


def test_jax_in_bfloat16():
    agree(JITTED, small_case((4, 3, 7, 5), "NHWC", "bfloat16"))


def test_compiled():
    agree(COMPILED, small_case((4, 3, 7, 5), "NHWC"))


@pytest.mark.parametrize("rank", [3, 5])
def test_other_ranks(rank):
    shape, layout = ((4, 3, 7), "NCL") if rank == 3 else ((2, 3, 4, 3, 5), "NDHWC")
    for contender in (BASE, NATIVE, MAPPED):
        agree(contender, small_case(shape, layout))


def test_who_takes_part():
    case = small_case(peers=("eager", "jax"))
    assert [c.name for c in contenders(case)] == [
        *("torch.nn", "native", "native, mapped", "eager", "jax"),
    ]
    assert [c.name for c in contenders(small_case(mode="inference"))] == ["torch.nn", "native"]
    assert {BASE.name, *BY_NAME} == set(PEERS)


def test_another_backend_is_not_timed_for_native():
    case = small_case()
    with bn.backend("eager"), pytest.raises(BenchError, match="eager would serve"):
        NATIVE.step(case, pose(case.problem, [BOTH]))


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr("batchnorm.bench.contenders.stock.shutil.which", lambda _: None)
    assert "needs a C++ compiler" in COMPILED.missing()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert 'pip install "batchnorm[bench]"' in JITTED.missing()


def test_the_environment_is_as_it_was_once_jax_has_its_pool(monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.setenv("NPROC", "7")
    JITTED.step(small_case(fusion=RELU), pose(small_case().problem, [BOTH]))
    assert os.environ["NPROC"] == "7"
    monkeypatch.delenv("NPROC")
    JITTED.step(small_case(fusion=RELU), pose(small_case().problem, [BOTH]))
    assert "NPROC" not in os.environ
