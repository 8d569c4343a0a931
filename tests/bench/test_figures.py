"""What the figures are taken over, and that they are what they say."""

from bench.small import made_up, rows_of, small_case

from batchnorm.bench.cases import FORWARD, PLAIN
from batchnorm.bench.figures import figures, mean

LARGE, MIDDLE, SMALL = (50, 10, 100, 100), (50, 10, 50, 50), (8, 4)  # 20 MB, 5 MB, 128 bytes
LARGER = (50, 10, 100, 200)  # 40 MB


def test_every_figure():
    def case(shape, layout="NCHW", **other):
        return small_case(shape, layout, threads=2, **other)

    rows = rows_of(
        made_up(case(LARGE), torch=0.08, native=0.01, mapped=0.0125, compile=0.16, jax=0.04),
        made_up(case(LARGE, "NHWC"), torch=0.02, native=0.01, mapped=0.02, compile=0.04, jax=0.04),
        made_up(case(LARGER), torch=0.08, native=0.02, ghost=0.018),
        made_up(case(LARGER, dtype="bfloat16"), torch=0.08, native=0.01),
        made_up(case(LARGE, "NHWC", dtype="bfloat16"), torch=0.08, native=0.001),  # 10 MB
        made_up(case(MIDDLE), torch=0.03, native=0.01, ghost=0.01),
        made_up(case(SMALL, "NC"), torch=0.02, native=0.01),
        # these are in none of the means
        made_up(case(SMALL, "NC", fusion=PLAIN), torch=0.01, native=0.01),
        made_up(case(SMALL, "NC", mode=FORWARD), torch=0.01, native=0.01),
        made_up(small_case(SMALL, "NC"), torch=0.0075, native=0.01),
    )
    assert {figure.name: figure.value for figure in figures(rows)} == {
        "times the speed of `torch.nn`, over 16 MB": "4.0x",  # 8, 2 and 4
        "times the speed of `torch.nn`, 1 to 16 MB": "3.0x",
        "times the speed of `torch.nn`, under 1 MB": "2.0x",
        "times the speed of `torch.compile`, over 16 MB": "8.0x",  # 16 and 4
        "times the speed of `jax`, over 16 MB": "4.0x",
        # 0.0125 of 5 passes of 0.002 s, 0.02 of 8
        "time against the floor, memory mapped, over 16 MB": "1.25",
        "time in bfloat16 against float32, both over 16 MB": "0.50",
        "time of `native, ghost 16` against `native`, mean of 2": "0.95",
        "time of `native, ghost 16` against `native`, slowest: 50x10x50x50 NCHW": "1.00",
        "slowest of all 10 cases: 8x4 NC, float32, relu, forward+backward, 1 thread": "0.75x",
        "largest error in float32, of the largest value": "1.0e-07",
        "largest error in bfloat16, of the largest value": "1.0e-07",
    }


def test_what_was_not_measured_has_no_figure():
    names = [f.name for f in figures(rows_of(made_up(small_case(SMALL, "NC"), torch=1, native=1)))]
    assert [name.split(":")[0] for name in names] == [
        "times the speed of `torch.nn`, under 1 MB",
        "slowest of all 1 cases",
        "largest error in float32, of the largest value",
    ]
    assert figures(rows_of(made_up(small_case(SMALL, "NC"), torch=1))) == []


def test_the_mean_is_geometric():
    assert mean([0.5, 2.0]) == 1.0
    assert mean([]) != mean([])
