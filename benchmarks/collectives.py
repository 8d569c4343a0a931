"""What the two collectives of a synchronized layer cost: a model in latency and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple


class Link(NamedTuple):
    """How long a message takes: latency + bytes / bandwidth.

    Attributes:
        latency: Of a message, in seconds.
        bandwidth: Bytes a second that a process can receive.
    """

    latency: float
    bandwidth: float

    def time(self, messages: float, received: float) -> float:
        """Return the seconds that so many messages behind each other take, of so many bytes."""
        return messages * self.latency + received / self.bandwidth


class Cluster(NamedTuple):
    """Where the processes are: nodes with a fast link inside, and a network between them.

    Attributes:
        inside: The link of two processes of a node.
        between: That of two processes of different nodes.
        per_node: The number of processes of a node, g.
        start: What a collective takes before its first message, in seconds.
    """

    inside: Link
    between: Link
    per_node: int
    start: float

    def nodes(self, processes: int) -> int:
        """Return how many nodes so many processes take."""
        return -(-processes // self.per_node)

    def link(self, processes: int) -> Link:
        """Return the slowest link that so many processes go over."""
        return self.inside if processes <= self.per_node else self.between


#: A data-center of GPUs: 1 us and 200 GB/s inside a node of 8, 5 us and 25 GB/s (a network card of
#: 200 Gbit/s each) between nodes, 10 us to launch. The latencies are of the order that NCCL's own
#: model has (src/graph/tuning.cc).
GPUS = Cluster(Link(1e-6, 200e9), Link(5e-6, 25e9), 8, 10e-6)


def row_bytes(channels: int) -> int:
    """Return the bytes that a process gives in the forward pass: count, mean and m2, float64."""
    return 8 * (2 * channels + 1)


def sums_bytes(channels: int) -> int:
    """Return the bytes that are added up in the backward pass: two float64 a channel."""
    return 16 * channels


def gather_by_ring(cluster: Cluster, processes: int, row: int) -> float:
    """Return the seconds of an all-gather, where each passes on what it got to the next.

    Args:
        cluster: Where they are.
        processes: How many there are, p.
        row: The bytes that each gives.
    """
    received = (processes - 1) * row
    return cluster.start + _once_around(cluster, processes) + _at_rest(cluster, processes, received)


def gather_by_tree(cluster: Cluster, processes: int, row: int) -> float:
    """Return the seconds of an all-gather in which what each has doubles with every message.

    Args:
        cluster: Where they are; every message may go over the slowest link.
        processes: How many there are, p.
        row: The bytes that each gives.
    """
    steps = _doublings(processes)
    return cluster.start + cluster.link(processes).time(steps, (processes - 1) * row)


def gather_by_nodes(cluster: Cluster, processes: int, row: int) -> float:
    """Return the seconds of an all-gather by trees, first over the nodes and then inside each.

    Args:
        cluster: Where they are.
        processes: How many there are, p.
        row: The bytes that each gives.
    """
    nodes, inside = cluster.nodes(processes), min(processes, cluster.per_node)
    between = cluster.between.time(_doublings(nodes), (nodes - 1) * row)
    return (
        cluster.start
        + between
        + cluster.inside.time(_doublings(inside), (inside - 1) * nodes * row)
    )


def sum_by_ring(cluster: Cluster, processes: int, values: int) -> float:
    """Return the seconds of an all-reduce in pieces, each of which goes around twice.

    Args:
        cluster: Where they are.
        processes: How many there are, p.
        values: The bytes that are added up.
    """
    received = 2 * (processes - 1) / processes * values
    twice = 2 * _once_around(cluster, processes)
    return cluster.start + twice + _at_rest(cluster, processes, received)


def sum_by_tree(cluster: Cluster, processes: int, values: int) -> float:
    """Return the seconds of an all-reduce up a tree and down again.

    Args:
        cluster: Where they are; every message may go over the slowest link.
        processes: How many there are, p.
        values: The bytes that are added up.
    """
    steps = 2 * _doublings(processes)
    return cluster.start + cluster.link(processes).time(steps, steps * values)


def sum_by_nodes(cluster: Cluster, processes: int, values: int) -> float:
    """Return the seconds of an all-reduce by trees, inside each node, between them, and back.

    Args:
        cluster: Where they are.
        processes: How many there are, p.
        values: The bytes that are added up.
    """
    nodes, inside = cluster.nodes(processes), min(processes, cluster.per_node)
    within, across = 2 * _doublings(inside), 2 * _doublings(nodes)
    return (
        cluster.start
        + cluster.inside.time(within, within * values)
        + cluster.between.time(across, across * values)
    )


GATHERS = {"ring": gather_by_ring, "tree": gather_by_tree, "nodes": gather_by_nodes}
SUMS = {"ring": sum_by_ring, "tree": sum_by_tree, "nodes": sum_by_nodes}


def wait(cluster: Cluster, processes: int, channels: int) -> float:
    """Return the seconds that a layer waits in a step, both ways, each by the fastest algorithm.

    Args:
        cluster: Where the processes are.
        processes: How many normalize together.
        channels: Of the layer.
    """
    gathers = (gather(cluster, processes, row_bytes(channels)) for gather in GATHERS.values())
    sums = (add(cluster, processes, sums_bytes(channels)) for add in SUMS.values())
    return min(gathers) + min(sums)


def wait_by_two_sums(cluster: Cluster, processes: int, channels: int) -> float:
    """Return the same for a forward pass that is exact without a gather: it adds up twice.

    First the counts and the sums, which give the mean, and then the squared distances from it. One
    all-reduce of sums and of squares would lose digits instead.

    Args:
        cluster: Where the processes are.
        processes: How many normalize together.
        channels: Of the layer.
    """
    sizes = 8 * (channels + 1), 8 * channels, sums_bytes(channels)
    return sum(min(add(cluster, processes, n) for add in SUMS.values()) for n in sizes)


def crossing(cluster: Cluster, channels: int) -> int:
    """Return from how many processes on two sums forward would be faster than the gather.

    Args:
        cluster: Where the processes are.
        channels: Of the layer.
    """
    return next(
        p
        for p in range(2, 1_000_000)
        if wait_by_two_sums(cluster, p, channels) < wait(cluster, p, channels)
    )


def resnet50() -> Iterator[int]:
    """Yield the channels of the 53 batch norms of a ResNet-50.

    Source:
        He et al., Deep residual learning for image recognition, 2016, table 1 (arXiv:1512.03385).
    """
    yield 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        yield 4 * width  # of the shortcut
        for _ in range(blocks):
            yield from (width, width, 4 * width)


def standard_error(values: int, processes: int) -> float:
    """Return the standard error of a batch's mean, in standard deviations: 1 / sqrt(m p).

    That of the deviation itself is by sqrt(2) less, for normal values.

    Args:
        values: Independent values a channel has on each process, m.
        processes: How many normalize together, p.
    """
    return 1 / math.sqrt(values * processes)


def _doublings(size: int) -> int:
    """Return after how many doublings one is at least that size."""
    return math.ceil(math.log2(size))


def _once_around(cluster: Cluster, processes: int) -> float:
    """Return the latency of a way over all processes, node by node."""
    crossings = cluster.nodes(processes) - 1
    return (
        crossings * cluster.between.latency + (processes - 1 - crossings) * cluster.inside.latency
    )


def _at_rest(cluster: Cluster, processes: int, received: float) -> float:
    """Return how long so many bytes take over the slowest link, without its latency."""
    return cluster.link(processes).time(0, received)
