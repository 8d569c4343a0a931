"""Checks of what is said when the processes do not get on."""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from ranks.batches import assert_same_everywhere, fails, layer_of
from ranks.processes import check
from ranks.values import random
from torch import nn

import batchnorm as bn

OURS = "batch normalization over", "Look at what the other ranks say first"


@check(2, 3, 4)
def unequal_channels_are_told_to_every_rank(rank, size):
    channels = 3 if rank == 1 else 4
    model = nn.Sequential(nn.Linear(2, channels), bn.SyncBatchNorm(channels))
    counts = [f"rank {r} has {3 if r == 1 else 4}" for r in range(size)]
    for _ in range(2):
        fails(lambda: model(torch.randn(5, 2)), RuntimeError, *counts, "'1' of Sequential")
    layer_of(3)(random(5, 3))  # nothing is left in the way


@check(4)
def members_of_a_group_are_called_by_their_rank_in_the_world(rank, size):
    groups = [dist.new_group(pair) for pair in ((0, 1), (2, 3))]
    layer = layer_of(rank + 1, process_group=groups[rank // 2])
    first = rank // 2 * 2
    counts = [f"rank {r} has {r + 1}" for r in (first, first + 1)]
    fails(lambda: layer(random(5, rank + 1)), RuntimeError, *counts)


@check(2, 3, patience=5, dies=True)
def a_rank_dies_before_the_forward_pass(rank, size):
    layer = layer_of(3)
    layer(random(4, 3))
    if rank == size - 1:
        os._exit(3)
    before = time.monotonic()
    message = fails(lambda: layer(random(4, 3)), RuntimeError, *OURS, f"rank {rank}", "moments")
    assert "[in SyncBatchNorm(3" in message
    assert time.monotonic() - before < 20


@check(2, patience=5, dies=True)
def a_rank_dies_before_the_first_call(rank, size):
    if rank == 1:
        os._exit(3)
    fails(lambda: layer_of(3)(random(4, 3)), RuntimeError, *OURS)


@check(2, patience=5, dies=True)
def a_rank_dies_before_the_backward_pass(rank, size):
    x = random(4, 3).requires_grad_()
    y = layer_of(3)(x)
    if rank == 1:
        os._exit(3)
    fails(lambda: y.backward(torch.ones_like(y)), RuntimeError, *OURS, "gradients")


@check(2, patience=1)
def a_rank_never_arrives(rank, size):
    layer = layer_of(3)
    layer(random(4, 3))
    if rank == 0:
        before = time.monotonic()
        fails(lambda: layer(random(4, 3)), RuntimeError, *OURS, "timeout")
        assert 0.9 < time.monotonic() - before < 10
    wait_for_rank_0(rank)


@check(2, patience=1)
def a_rank_that_fails_says_why_itself(rank, size):
    layer = layer_of(3)
    layer(random(4, 3))
    if rank == 0:
        fails(lambda: layer(random(4, 3)), RuntimeError, *OURS)
    else:
        fails(lambda: layer(random(4, 7)), RuntimeError, "should contain 7 elements not 3")
    wait_for_rank_0(rank)


def wait_for_rank_0(rank):
    """Stay alive until rank 0 has come here, too."""
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set("rank 0 is here", "")
    store.wait(["rank 0 is here"], timedelta(seconds=20))


@check(2)
def no_statistics_move_in_a_call_that_fails(rank, size):
    layer = layer_of(3 + rank)
    fails(lambda: layer(random(4, 3 + rank)), RuntimeError, "unequal channels")
    assert layer.num_batches_tracked == 0
    other = layer_of(3)
    other(random(4, 3))
    assert_same_everywhere(other)
