"""What the tests of the bench on a GPU share: small cases, made-up times and rows."""

from dataclasses import replace

from batchnorm.bench.cases import BOTH, FORWARD, RELU, RESIDUAL, Case, Problem
from benchmarks.gpu.rows import CALL, GRAPH, Entry, rows
from benchmarks.models.measure import Row as ModelRow
from benchmarks.models.ways import ACCELERATED, SAVING, STOCK, TRAINING

STEM = (2, 64, 112, 112)
#: Seconds in which the bytes of its 12 passes are moved at 2 GB/s.
SOON = 12 * 2 * 64 * 112 * 112 * 2 / 2e9


def case_of(layout="NHWC", dtype="bfloat16", fusion=RELU, mode=BOTH, shape=(2, 256, 14, 14)):
    return Case(Problem(shape, layout, dtype, fusion), mode, 1)


def made_up(seconds, case=None):
    """Return the rows of a case where every round took so long, at a speed of 1 GB/s."""
    times = {Entry(*key): [value] * 3 for key, value in seconds.items()}
    return list(rows(case or case_of(), times, dict.fromkeys(times, 1e-3), 1e9, 1))


def model_row(way, **changes):
    row = ModelRow(
        network="ResNet-50", layout="NHWC", mode=TRAINING, way=way.name, batch=256, image=224,
        q25_ms=90.0, median_ms=100.0, q75_ms=110.0, ratio=1.0, ratio_q25=1.0, ratio_q75=1.0,
        kept_mb=None, kept=None, peak_mb=2e4, peak=1.0, exact=0.0, apart=1e-3, rounds=20,
    )  # fmt: skip
    return replace(row, **changes)


ROWS = [
    *made_up({("torch.nn", CALL): 4.0, ("batchnorm", CALL): 1.0, ("torch.compile", CALL): 2.0}),
    *made_up(
        {("torch.nn", CALL): 2.0, ("batchnorm", CALL): 1.0, ("batchnorm", GRAPH): 0.5},
        case_of(shape=STEM),
    ),
    *made_up(
        {("torch.nn", CALL): 2.0, ("batchnorm", CALL): SOON},
        case_of("NCHW", fusion=RESIDUAL, shape=STEM),
    ),
    *made_up({("torch.nn", CALL): 9.0, ("batchnorm", CALL): 1.0}, case_of(mode=FORWARD)),
]
MODELS = [
    model_row(STOCK),
    model_row(ACCELERATED, ratio=1.3, apart=2e-3),
    model_row(SAVING, peak=0.65),
]
