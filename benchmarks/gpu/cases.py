"""What is measured on a GPU: the batch norms of ResNet-50, and how often each must cross memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from batchnorm.bench.cases import (
    BOTH,
    DTYPES,
    FORWARD,
    INFERENCE,
    PLAIN,
    RELU,
    RESIDUAL,
    Case,
    Problem,
)

LAYOUTS = ("NHWC", "NCHW")
#: What follows each batch norm that is timed.
FUSIONS = (RELU, RESIDUAL)
#: The width of each stage of ResNet-50, and how many blocks it has.
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
#: Images in a batch: on a GPU, in a quick run there, and on a CPU.
BATCH, QUICK_BATCH, CPU_BATCH = 256, 32, 2
#: The layers of a quick run.
QUICK_SHAPES = ((256, 14, 14), (512, 7, 7))


class Layer(NamedTuple):
    """A batch norm of a network.

    Attributes:
        shape: Channels, height and width of its input.
        follows: What follows it: nothing, ReLU, or the residual's addition and ReLU.
    """

    shape: tuple[int, int, int]
    follows: str


class Passes(NamedTuple):
    """How often a batch crosses memory.

    Attributes:
        floor: Where what is read twice comes from memory twice.
        once: Where it stays in a cache until it is read again, which is the least there can be.
    """

    floor: int
    once: int


def resnet50() -> Iterator[Layer]:
    """Yield the 53 batch norms of ResNet-50 on images of 224x224.

    A stage after the first halves height and width in the second convolution of its first block,
    and the shortcut of that block has a batch norm of its own.

    Source:
        He et al., Deep residual learning for image recognition, 2016, table 1 (arXiv:1512.03385).
    """
    yield Layer((64, 112, 112), RELU)
    before = size = 56
    for width, blocks in STAGES:
        for _ in range(blocks):
            yield Layer((width, before, before), RELU)
            yield Layer((width, size, size), RELU)
            yield Layer((4 * width, size, size), RESIDUAL)
            before = size
        yield Layer((4 * width, size, size), PLAIN)
        size //= 2


#: How many layers have an input of each shape.
COUNTS = Counter(layer.shape for layer in resnet50())


def passes(mode: str, fusion: str) -> Passes:
    """Return how often a batch is read or written at least.

    Forward in training x is read for its moments and again to be normalized, and y is written: 3
    passes. Backward x and dy are read for the sums and again for dx, which is written: 5 passes.
    A residual is read once forward. Backward, to know where ReLU let something through, it is read
    with x both times, and its gradient is written: 3 passes more. Inference reads x once.

    Args:
        mode: What is timed.
        fusion: What follows the normalization.
    """
    added = int(fusion == RESIDUAL)
    forward, backward = Passes(3 + added, 2 + added), Passes(5 + 3 * added, 3 + 2 * added)
    if mode == BOTH:
        return Passes(forward.floor + backward.floor, forward.once + backward.once)
    return forward if mode == FORWARD else Passes(forward.once, forward.once)


def plan(batch: int, dtypes: Sequence[str], quick: bool) -> tuple[list[Case], list[Case]]:
    """Return the cases that the figures are about, and the others.

    Args:
        batch: The number of images.
        dtypes: The types; the figures are about the first.
        quick: Whether a first impression will do.
    """
    shapes = QUICK_SHAPES if quick else tuple(COUNTS)
    threads = torch.get_num_threads()

    def cases(dtype: str, mode: str) -> list[Case]:
        return [
            Case(Problem((batch, *shape), layout, dtype, fusion), mode, threads)
            for layout in LAYOUTS
            for fusion in FUSIONS
            for shape in shapes
        ]

    first = cases(dtypes[0], BOTH)
    if quick:
        return first, []
    others = [(dtype, mode) for mode in (BOTH, FORWARD, INFERENCE) for dtype in dtypes]
    return first, [case for pair in others[1:] for case in cases(*pair)]


def title(case: Case) -> str:
    """Return what a case is called."""
    p = case.problem
    return f"{p.size} {p.layout}, {p.dtype}, {p.fusion}, {case.mode}"


def layers_like(case: Case) -> int:
    """Return how many layers of ResNet-50 have an input of the shape of a case."""
    channels, height, width = case.problem.shape[1:]
    return COUNTS[channels, height, width]


#: bfloat16 is what networks are trained in on a GPU.
DEFAULT_DTYPES = DTYPES[1:]
