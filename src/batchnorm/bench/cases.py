"""What is measured: every case, what takes part in it, and how many bytes it must move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from batchnorm.bench.errors import BenchError

FORWARD, BOTH, INFERENCE = "forward", "forward+backward", "inference"
MODES = (BOTH, FORWARD, INFERENCE)
PLAIN, RELU, RESIDUAL = "plain", "relu", "residual+relu"
FUSIONS = (PLAIN, RELU, RESIDUAL)
DTYPES = ("float32", "bfloat16")
PEERS = ("torch.nn", "eager", "compile", "jax")

SHAPES = (
    (32, 64, 112, 112), (32, 256, 56, 56), (128, 64, 32, 32), (32, 2048, 7, 7), (8, 3, 224, 224),
    (1, 64, 256, 256), (4096, 4096), (256, 1024), (64, 512), (32, 128),
)  # fmt: skip
#: What `--quick` takes of them.
QUICK_SHAPES = ((32, 64, 112, 112), (128, 64, 32, 32), (32, 2048, 7, 7), (256, 1024), (32, 128))
#: The smaller ones that the slow to compile take part in, too.
COMPILED_SHAPES = ((32, 2048, 7, 7), (8, 3, 224, 224), (256, 1024))
#: A batch of more MB does not stay in the cache from one pass to the next.
LARGE_MB = 16
#: Neither does a channel for which more MB are read.
LARGE_CHANNEL_MB = 2
_LINE = 64  # bytes that are read at a time

_LAYOUTS = {2: ("NC",), 3: ("NCL",), 4: ("NCHW", "NHWC"), 5: ("NCDHW", "NDHWC")}
_FORMATS = {"NHWC": torch.channels_last, "NDHWC": torch.channels_last_3d}


@dataclass(frozen=True)
class Problem:
    """What is computed, however it is done.

    Attributes:
        shape: The batch's, (N, C, ...).
        layout: The order of its dimensions in memory.
        dtype: Its type.
        fusion: What follows the normalization: one of `FUSIONS`.
    """

    shape: tuple[int, ...]
    layout: str
    dtype: str
    fusion: str

    @property
    def mb(self) -> float:
        """The size of the batch in MB."""
        return math.prod(self.shape) * self.torch_dtype.itemsize / 1e6

    @property
    def channel_mb(self) -> float:
        """What is read for one channel, in MB: where others lie beside it, whole cache lines."""
        values = self.shape[1] if self.channels_last else 1
        step = min(_LINE, values * self.torch_dtype.itemsize)
        return math.prod(self.shape) // self.shape[1] * step / 1e6

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout as torch has it."""
        return _FORMATS.get(self.layout, torch.contiguous_format)

    @property
    def channels_last(self) -> bool:
        """Whether the values of a channel are apart in memory."""
        return self.layout.endswith("C")

    @property
    def size(self) -> str:
        """The shape as text."""
        return "x".join(map(str, self.shape))


@dataclass(frozen=True)
class Case:
    """A problem, which part of it is timed, and who takes part.

    Attributes:
        problem: What is computed.
        mode: One of `MODES`.
        threads: How many there are.
        peers: Those of `PEERS` that take part beside `torch.nn`, which always does.
    """

    problem: Problem
    mode: str
    threads: int
    peers: tuple[str, ...] = ()

    @property
    def main(self) -> bool:
        """Whether it is BN + ReLU, forward and backward, which the figures are about."""
        return self.mode == BOTH and self.problem.fusion == RELU

    @property
    def passes(self) -> int:
        """How often a batch is read or written at least, where what is read twice stays in cache.

        2 forward and 3 backward; a residual is read in both, and its gradient written.
        """
        residual = self.problem.fusion == RESIDUAL
        return 5 + 3 * residual if self.mode == BOTH else 2 + residual

    @property
    def floor(self) -> int:
        """The same, where a large channel of a large batch is read twice: 3 and 5."""
        problem = self.problem
        once = problem.mb <= LARGE_MB or problem.channel_mb <= LARGE_CHANNEL_MB
        if once or self.mode == INFERENCE:
            return self.passes
        return self.passes + (3 if self.mode == BOTH else 1)

    def __str__(self) -> str:
        p = self.problem
        return label(p.size, p.layout, p.dtype, p.fusion, self.mode, self.threads)


def label(size: str, layout: str, dtype: str, fusion: str, mode: str, threads: int) -> str:
    """Return what a case is called."""
    plural = "s" if threads > 1 else ""
    return f"{size} {layout}, {dtype}, {fusion}, {mode}, {threads} thread{plural}"


@dataclass(frozen=True)
class Wanted:
    """What a user asks for; None leaves it to the plan.

    Attributes:
        shapes: Of the batches, (N, C, ...).
        dtypes: Some of `DTYPES`.
        modes: Some of `MODES`.
        threads: Their numbers; 0 stands for all.
        peers: Some of `PEERS`.
        quick: Whether a first impression will do.
    """

    shapes: tuple[tuple[int, ...], ...] | None = None
    dtypes: tuple[str, ...] | None = None
    modes: tuple[str, ...] | None = None
    threads: tuple[int, ...] | None = None
    peers: tuple[str, ...] | None = None
    quick: bool = False

    @classmethod
    def parse(
        cls,
        shapes: str | None = None,
        dtypes: str | None = None,
        modes: str | None = None,
        threads: str | None = None,
        peers: str | None = None,
        quick: bool = False,
    ) -> Wanted:
        """Read what was written on a command line, lists with commas.

        Raises:
            BenchError: Something in a list is not known.
        """
        return cls(
            None if shapes is None else tuple(map(_shape, _split(shapes))),
            None if dtypes is None else _some_of(DTYPES, dtypes, "dtypes"),
            None if modes is None else _some_of(MODES, modes, "modes"),
            None if threads is None else tuple(map(_number, _split(threads))),
            None if peers is None else _some_of(PEERS, peers, "peers"),
            quick,
        )


def plan(wanted: Wanted, cores: int) -> list[Case]:
    """Return the cases, those of the same problem beside each other.

    What was not asked for is chosen so that a run takes minutes: one thread is left out where a
    batch is large, other than for BN + ReLU, forward and backward; and so are all peers but
    `torch.nn`, of which the compiled ones take part where a batch is large, and in a few others.

    Args:
        wanted: What was asked for.
        cores: How many threads all are.
    """
    return list(_cases(wanted, cores))


def _cases(wanted: Wanted, cores: int) -> Iterator[Case]:
    quick = wanted.quick
    counts = wanted.threads or ((0,) if quick else (0, 1))
    threads = tuple(dict.fromkeys(count or cores for count in counts))
    for shape in wanted.shapes or (QUICK_SHAPES if quick else SHAPES):
        for layout in _LAYOUTS[len(shape)]:
            for dtype in wanted.dtypes or (DTYPES[:1] if quick else DTYPES):
                for fusion in (RELU,) if quick else FUSIONS:
                    problem = Problem(shape, layout, dtype, fusion)
                    for mode in wanted.modes or (MODES[:1] if quick else MODES):
                        for count in threads:
                            case = Case(problem, mode, count)
                            one_of_many = wanted.threads is None and count != threads[0]
                            if one_of_many and is_large(shape) and not case.main:
                                continue
                            peers = _peers(case, wanted, threads)
                            yield Case(problem, mode, count, peers)


def is_large(shape: tuple[int, ...]) -> bool:
    """Return whether a batch of this shape does not stay in the cache, in float32."""
    return math.prod(shape) * 4 / 1e6 > LARGE_MB


def _peers(case: Case, wanted: Wanted, threads: tuple[int, ...]) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    if wanted.peers is not None:
        found = wanted.peers if case.main or wanted.modes is not None else ()
    elif case.main and case.threads == threads[0] and not wanted.quick:
        shape = case.problem.shape
        compiled = is_large(shape) or shape in COMPILED_SHAPES or wanted.shapes is not None
        found = ("eager", "compile", "jax") if compiled else ("eager",)
    # the pool of XLA is made once for a process
    fixed = case.threads != max(threads)
    return tuple(peer for peer in found if peer != "torch.nn" and not (peer == "jax" and fixed))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _some_of(known: tuple[str, ...], text: str, what: str) -> tuple[str, ...]:
    parts = _split(text)
    for part in parts:
        if part not in known:
            raise BenchError(
                f"--{what}: got {part!r}, expected some of {', '.join(known)}, with commas"
            )
    return tuple(dict.fromkeys(parts))


def _shape(text: str) -> tuple[int, ...]:
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split("x")]
    if not 2 <= len(sizes) <= 5 or min(sizes) < 1 or math.prod(sizes) == sizes[1]:
        raise BenchError(
            f"--shapes: got {text!r}, expected examples x channels, or with 1 to 3 more sizes, "
            "and more than one value a channel, as 32x64x112x112 or 256x1024, with commas"
        )
    return tuple(sizes)


def _number(text: str) -> int:
    if text == "all":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise BenchError(f"--threads: got {text!r}, expected 'all' or numbers from 1, with commas")
    return int(text)
