"""What the tests of the bench share: small cases, made-up times and rows."""

from batchnorm.bench.cases import BOTH, RELU, Case, Problem
from batchnorm.bench.measure import Taken
from batchnorm.bench.rows import rows


def small_case(
    shape=(4, 3, 5, 5), layout="NCHW", dtype="float32", fusion=RELU, mode=BOTH, threads=1, peers=()
):
    return Case(Problem(shape, layout, dtype, fusion), mode, threads, tuple(peers))


def made_up(case, **seconds):
    """What was measured of a case where every round of an implementation took so long."""
    names = {"torch": "torch.nn", "compile": "torch.compile", "mapped": "native, mapped"}
    names["ghost"] = "native, ghost 16"
    times = {names.get(name, name): [value] * 3 for name, value in seconds.items()}
    return Taken(case, times, dict.fromkeys(times, 1e-7))


def rows_of(*taken, speed=1e10):
    return rows(taken, dict.fromkeys((1, 2, 16), speed))
