"""Checks of whole trainings: step for step what one process with the whole batch does."""

import copy
import inspect

import torch
import torch.distributed as dist
from ranks.batches import (
    GATHER,
    alone,
    assert_named,
    assert_same_everywhere,
    assert_statistics_like_one,
    counted,
    layer_of,
    part,
    step,
)
from ranks.processes import check
from ranks.values import random
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

F64 = torch.float64
EACH = 4  # examples a rank
COMPILER, SHARDING = "torch._dynamo", "torch.distributed.fsdp"
#: What it is called since torch 2.13, and was called before.
BROADCAST = "forward_sync_buffers"
if BROADCAST not in inspect.signature(DistributedDataParallel).parameters:
    BROADCAST = "broadcast_buffers"


class Network(nn.Module):
    """Two convolutions with a shortcut, and a classifier."""

    def __init__(self, kind):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = kind(4, activation="relu")
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.add = kind(4, activation="silu")
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        """Return a score a class."""
        y = self.norm(self.first(x))
        return self.out(self.add(self.second(y), y).mean((2, 3)))


def networks():
    """Return a synchronized network and the same for one process."""
    torch.manual_seed(5)
    ours, whole = Network(bn.SyncBatchNorm).double(), Network(bn.BatchNorm).double()
    whole.load_state_dict(ours.state_dict())
    return ours, whole


def micro_batches(size, number):
    """Return batches of all ranks: inputs and the classes that are wanted."""
    count = EACH * size
    return [(random(count, 2, 5, 5, mean=1.0), torch.randint(3, (count,))) for _ in range(number)]


def own_part(values, rank, size):
    return part(values, (EACH,) * size, rank)


def loss_of(network, x, wanted):
    return nn.functional.cross_entropy(network(x), wanted)


def descend(network, rate=0.3):
    """Return an optimizer with momentum, so that a wrong step goes on being wrong."""
    return torch.optim.SGD(network.parameters(), rate, momentum=0.9)


def assert_same_network(ours, whole):
    """Assert that parameters and statistics are those of one process."""
    expected = dict(whole.named_parameters())
    for name, values in ours.named_parameters():
        values = values.full_tensor() if hasattr(values, "full_tensor") else values
        assert_named(name, values, expected[name], F64, times=10)
    for name in ("norm", "add"):
        assert_statistics_like_one(getattr(ours, name), getattr(whole, name), times=10)


@check(2, 3, needs=(COMPILER,))
def data_parallel_training(rank, size):
    for broadcast in (True, False):
        ours, whole = networks()
        parallel = DistributedDataParallel(ours, **{BROADCAST: broadcast})
        optimizers = descend(ours), descend(whole)
        for batch in micro_batches(size, 3):
            loss_of(parallel, *(own_part(v, rank, size) for v in batch)).backward()
            loss_of(whole, *batch).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert_same_network(ours, whole)
        assert ours.norm.num_batches_tracked == 3
        parallel.eval()
        whole.eval()
        x = random(2 + rank, 2, 5, 5)  # as many as there are
        assert_named("in evaluation", ours(x), whole(x), F64, times=10)


@check(2, needs=(COMPILER,), limit=90.0)
def accelerated_data_parallel_training(rank, size):
    for save_memory in (False, True):
        torch.manual_seed(5)
        stock = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.LazyLinear(3),
        ).double()  # fmt: skip
        stock(random(EACH, 2, 5, 5))
        fast = copy.deepcopy(stock)
        around = bn.accelerate(DistributedDataParallel(fast), save_memory=save_memory)
        pairs = [(DistributedDataParallel(stock), descend(stock)), (around, descend(fast))]
        synchronized, whole = networks()
        around = bn.accelerate(DistributedDataParallel(synchronized), save_memory=save_memory)
        single = [(around, descend(synchronized)), (whole, descend(whole))]
        for batch in micro_batches(size, 3):
            own = [own_part(v, rank, size) for v in batch]
            for network, optimizer in (*pairs, *single):
                optimizer.zero_grad()
                loss_of(network, *(batch if network is whole else own)).backward()
                optimizer.step()
            for (name, ours), theirs in zip(
                fast.state_dict().items(), stock.state_dict().values(), strict=True
            ):
                assert_named(name, ours, theirs, F64, times=10)
            assert_same_network(synchronized, whole)


@check(2, needs=(COMPILER,))
def data_parallel_training_that_accumulates(rank, size):
    """Each micro-batch is normalized on its own, over all processes."""
    ours, whole = networks()
    parallel = DistributedDataParallel(ours)
    optimizers = descend(ours), descend(whole)
    for _ in range(3):
        first, second = micro_batches(size, 2)
        with parallel.no_sync():
            loss_of(parallel, *(own_part(v, rank, size) for v in first)).backward()
        loss_of(parallel, *(own_part(v, rank, size) for v in second)).backward()
        for batch in (first, second):
            loss_of(whole, *batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same_network(ours, whole)


@check(2, needs=(COMPILER,))
def two_forward_passes_and_one_backward_pass(rank, size):
    ours, whole = networks()
    parallel = DistributedDataParallel(ours)
    first, second = micro_batches(size, 2)
    both = [loss_of(parallel, *(own_part(v, rank, size) for v in b)) for b in (first, second)]
    sum(both).backward()
    sum(loss_of(whole, *batch) for batch in (first, second)).backward()
    expected = dict(whole.named_parameters())
    for name, values in ours.named_parameters():
        assert_named(name, values.grad, expected[name].grad, F64, times=10)


def shard(module, size, **types):
    """Shard a module's parameters over all ranks, as FSDP2 does."""
    from torch.distributed.device_mesh import init_device_mesh  # takes long
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (size,))
    fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**types))


@check(2, needs=(SHARDING,))
def fully_sharded_training(rank, size):
    ours, whole = networks()
    for module in (ours.norm, ours.add, ours):
        shard(module, size)
    optimizers = descend(ours), descend(whole)
    for batch in micro_batches(size, 3):
        loss_of(ours, *(own_part(v, rank, size) for v in batch)).backward()
        loss_of(whole, *batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same_network(ours, whole)


@check(2, needs=(SHARDING,))
def statistics_stay_float32_where_parameters_are_cast(rank, size):
    ours = networks()[0].float()
    shard(ours, size, param_dtype=torch.bfloat16)
    seen = []
    ours.norm.register_forward_hook(
        lambda layer, given, y: seen.append((layer.weight.dtype, given[0], y.dtype))
    )
    (batch,) = micro_batches(size, 1)
    x, wanted = (own_part(v, rank, size) for v in batch)
    loss_of(ours, x.float(), wanted).backward()
    ((of_weight, given, of_y),) = seen
    assert (of_weight, given.dtype, of_y) == (torch.bfloat16,) * 3
    assert {ours.norm.running_mean.dtype, ours.norm.running_var.dtype} == {torch.float32}
    every = [torch.empty_like(given) for _ in range(size)]
    dist.all_gather(every, given.contiguous())
    moments = bn.Moments.of(torch.cat(every))
    assert_named("mean", ours.norm.running_mean, 0.1 * moments.mean, torch.float32)
    assert_named("var", ours.norm.running_var, 0.9 + 0.1 * moments.var(1), torch.float32)
    assert_same_everywhere(ours)


@check(2, needs=(COMPILER,))
def compiled_as_one_graph(rank, size):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shares = (3, 6)
    layer = layer_of(3, activation="relu")
    other, eager = copy.deepcopy(layer), copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for times in (1, 2):
        x, dy, residual = (random(9, 3, 4) for _ in range(3))
        own = [part(v, shares, rank) for v in (x, dy, residual)]
        results = []
        for module in (eager, compiled):
            inputs = [v.clone().requires_grad_() for v in own]
            with counted() as calls:
                found = step(module, inputs[0], own[1], inputs[2])
            results.append({name.replace("_orig_mod.", ""): v for name, v in found.items()})
        for name, values in results[0].items():
            assert_named(name, results[1][name], values, F64)
        assert_statistics_like_one(other, eager)
        assert calls == [GATHER, "all_reduce"], calls  # there is no handshake in a graph
        assert other.num_batches_tracked == times
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@check(2, 3, needs=(COMPILER,))
def both_checkpoints_update_once(rank, size):
    for reentrant in (True, False):
        layer, x, dy = layer_of(3, activation="silu"), random(9, 3, 4), random(9, 3, 4)
        shares = (3, 6) if size == 2 else (3, 0, 6)
        whole = alone(layer)
        expected = step(whole, x.clone().requires_grad_(), dy)
        own = part(x, shares, rank).requires_grad_()
        layer(own)  # the handshake
        layer.reset_running_stats()
        with counted() as calls:
            y = checkpoint(layer, own, use_reentrant=reentrant)
            y.backward(part(dy, shares, rank))
        assert calls == [GATHER, GATHER, "all_reduce"]
        assert_named("y", y, part(expected["y"], shares, rank), F64)
        assert_named("dx", own.grad, part(expected["dx"], shares, rank), F64)
        assert_statistics_like_one(layer, whole)
        assert layer.num_batches_tracked == 1
