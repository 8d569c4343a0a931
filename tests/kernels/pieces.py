"""Programs that show what a part of the others does."""

import triton
import triton.language as tl

from batchnorm.kernels.triton.programs.held import meet
from batchnorm.kernels.triton.programs.places import offsets_of


@triton.jit
def offset_of(
    found, row, row_step, unit_step, unit,
    PLANAR: tl.constexpr, FAR: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write where a place lies."""
    rows = row + tl.zeros([1, 1], tl.int32)
    if FAR:
        rows = rows.to(tl.int64)
    unit = tl.sum(tl.sum(unit + tl.zeros([1, 1], tl.int32), 1), 0)
    at = offsets_of(rows, 0, row_step, unit_step, unit, PLANAR, 1, FAR, ALIGN)
    tl.store(found + tl.zeros([1, 1], tl.int32), at)


@triton.jit
def arrive(there, PROGRAMS: tl.constexpr):
    """Meet the others."""
    meet(there, PROGRAMS)
