"""Every variant with every other, held to the reference: forward, backward, running statistics."""

import copy
import itertools

import numpy as np
import pytest
import torch
from support import (
    BACKENDS,
    Together,
    as_numpy,
    assert_close,
    expected_running,
    expected_step,
    make,
    weights_of,
)

import batchnorm as bn

SHAPES = {
    "NC": ((24, 5), torch.contiguous_format),
    "NCL": ((11, 5, 7), torch.contiguous_format),
    "NCHW": ((9, 5, 4, 3), torch.contiguous_format),
    "NHWC": ((9, 5, 4, 3), torch.channels_last),
    "NCDHW": ((10, 5, 2, 3, 2), torch.contiguous_format),
}
VARIANTS = ("masked", "ghost", "renorm", "banked", "frozen", "sync")
#: All of the variants together and apart, each with two layouts, and the backends in turn.
CASES = [
    (frozenset(itertools.compress(VARIANTS, chosen)), layout, BACKENDS[at // 5 % len(BACKENDS)])
    for at, (chosen, layout) in enumerate(
        (chosen, [*SHAPES][(3 * first + second) % 5])
        for first, chosen in enumerate(itertools.product([False, True], repeat=len(VARIANTS)))
        for second in (0, 1)
    )
]
NORMALIZES = {"eps": 0.1, "activation": "gelu"}
LIMITS = (1.25, 0.125)  # which float32 has exactly


def test_every_pair_is_among_the_cases():
    for case in itertools.product([False, True], repeat=2):
        for pair in itertools.combinations(VARIANTS, 2):
            there = [
                (layout, backend)
                for chosen, layout, backend in CASES
                if tuple(variant in chosen for variant in pair) == case
            ]
            assert {layout for layout, _ in there} == SHAPES.keys()
            assert {backend for _, backend in there} == set(BACKENDS)


def layer_of(chosen, numbers):
    """Return a layer of these variants, with the numbers of its banks, and those banks."""
    settings = {**NORMALIZES, "dtype": torch.float64, "momentum": 0.3}
    kind = bn.BatchNorm
    if "renorm" in chosen:
        kind, (r_max, d_max) = bn.BatchRenorm, LIMITS
        settings |= {"r_max": r_max, "d_max": d_max}
        settings |= {"warmup_batches": 0, "r_batches": 0, "d_batches": 0}
    if "ghost" in chosen:
        settings["ghost_size"] = 3
    if "frozen" in chosen:
        settings |= {"statistics": "running", "update": "never"}
    if "banked" in chosen:
        layer = bn.BankedBatchNorm(5, layer=kind, banks=("a", "b", "unused"), **settings)
        banks = [*layer.banks.values()]
    else:
        layer = kind(5, **settings)
        banks = [layer]
    for bank, (weight, bias, mean, var) in zip(banks, numbers, strict=False):
        state = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        bank.load_state_dict({**bank.state_dict(), **state})
    return layer, banks


def expected_of(chosen, numbers, x, residual, dy, mask, index, rank):
    """Return y, dx and dresidual, and for each bank dweight, dbias and its statistics after."""
    whole, banks = [np.empty(x.shape) for _ in range(3)], []
    for at, (weight, bias, *running) in enumerate(numbers):
        options = {"eps": NORMALIZES["eps"], "renorm": LIMITS if "renorm" in chosen else None}
        if "frozen" in chosen:
            options["renorm"] = None
        if "frozen" in chosen or "renorm" in chosen:
            options["running"] = [as_numpy(v) for v in running]
        if "ghost" in chosen:  # each rank has its own groups
            options["ghost_size"] = 3
            shares = [(index == at) & (rank == r) for r in rank.unique()]
        else:
            shares = [index == at]
        sums = np.zeros((2, 5))
        for rows in shares:
            weights = None if mask is None else mask[rows]
            values = x[rows], weight, bias, residual[rows], dy[rows]
            y, dx, dweight, dbias, dresidual = expected_step(
                *values, NORMALIZES["activation"], weights=weights, **options
            )
            for part, share in zip(whole, (y, dx, dresidual), strict=True):
                part[as_numpy(rows) == 1] = share
            sums += dweight, dbias
        if "frozen" not in chosen:
            mine = index == at
            running = expected_running(
                running, x[mine], 0.3, weights=None if mask is None else mask[mine]
            )
        banks.append((*sums, *running))
    return whole, banks


@pytest.mark.parametrize(
    ("chosen", "layout", "backend"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value)) or "batch",
)
def test_equals_the_reference(chosen, layout, backend):
    shape, memory_format = SHAPES[layout]
    x, _, _, residual, dy = make(shape, 1, memory_format, torch.float64)
    mask = weights_of(shape, 1) if "masked" in chosen else None
    examples = torch.arange(shape[0])
    index = examples % 2 if "banked" in chosen else torch.zeros_like(examples)
    rank = (examples > shape[0] // 2).long() if "sync" in chosen else torch.zeros_like(examples)
    numbers = [
        (torch.randn(5).double(), *torch.randn(2, 5).double(), torch.rand(5).double() * 4 + 1)
        for _ in index.unique()
    ]
    layer, _ = layer_of(chosen, numbers)

    def work(at, pool=None):
        mine, rows = copy.deepcopy(layer), rank == at
        banks = [*mine.banks.values()] if "banked" in chosen else [mine]
        for bank in banks if pool is not None else ():
            bank.process_group, bank._pool = "world", lambda _: pool
        leaves = [
            v[rows].contiguous(memory_format=memory_format).requires_grad_() for v in (x, residual)
        ]
        arguments = [*leaves, None if mask is None else mask[rows]]
        if "banked" in chosen:
            arguments.append(index[rows])
        with bn.backend(backend):
            y = mine(*arguments)
            asked = [*leaves, *(p for bank in banks for p in (bank.weight, bank.bias))]
            found = torch.autograd.grad(y, asked, dy[rows], allow_unused=True)
        return y, *found, banks

    results = Together(2).run(work) if "sync" in chosen else [work(0)]
    whole, expected = expected_of(chosen, numbers, x, residual, dy, mask, index, rank)
    found = [torch.cat([result[at] for result in results]) for at in range(3)]
    for mine, truth in zip(found, whole, strict=True):
        assert_close(mine, truth, torch.float64)
    for at, (dweight, dbias, mean, var) in enumerate(expected):
        for place, truth in ((3 + 2 * at, dweight), (4 + 2 * at, dbias)):
            total = sum(result[place] for result in results)
            assert_close(total, truth, torch.float64, "sum", 10)
        for *_, banks in results:
            assert_close(banks[at].running_mean, mean, torch.float64, "sum")
            assert_close(banks[at].running_var, var, torch.float64, "sum")
            assert banks[at].num_batches_tracked == ("frozen" not in chosen)
