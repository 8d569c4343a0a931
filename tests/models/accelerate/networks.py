"""Small networks, and their inputs."""

import torch
from torch import nn
from torch.nn import functional as F


class Network(nn.Module):
    """What a function does with batch norms, convolutions and its inputs.

    Args:
        function: Takes the module, and the inputs.
        norm: Makes a batch norm.
    """

    def __init__(self, function, norm=nn.BatchNorm2d):
        super().__init__()
        self.function = function
        self.norms = nn.ModuleList(norm(4) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1, bias=False) for _ in range(3))
        randomize(self.norms)

    def forward(self, *inputs):
        return self.function(self, *inputs)


class Table(nn.Module):
    """Functions of (batch norm, x, residual), each with a layer of its own, all in one graph.

    Args:
        functions: The functions.
    """

    def __init__(self, functions):
        super().__init__()
        self.functions = list(functions)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in self.functions)
        randomize(self.norms)

    def forward(self, x, residual):
        return [
            function(norm, x * 1, residual * 1)
            for norm, function in zip(self.norms, self.functions, strict=True)
        ]


def chained(m, x, r):
    """Do what most networks do."""
    y = F.silu(m.norms[0](m.convs[0](x)))
    z = F.relu(m.norms[1](m.convs[1](y)) + y)
    return F.relu(m.norms[2](m.convs[2](F.mish(z))) + r)


def start(m, x):
    """Do what one layer does."""
    return F.relu(m.norms[0](m.convs[0](x)))


def blocks(m, x, r):
    """Do what residual networks do."""
    for _ in range(2):
        for norm, conv in zip(m.norms, m.convs, strict=True):
            x = F.relu(norm(conv(x)) + x)
    return m.convs[0](x)


def network(function=chained, **options):
    """Return a network in float64, the same each time."""
    torch.manual_seed(1)
    return Network(function, **options).double()


def randomize(layers):
    """Let affine parts be those of no new layer."""
    with torch.no_grad():
        for p in layers.parameters():
            p.normal_()


def images(*shape, n=2):
    """Return random images, as many as are asked for."""
    return [torch.randn(shape or (3, 4, 5, 5)) for _ in range(n)]


def doubles(*shape, n=2):
    """Return them in float64."""
    return [v.double() for v in images(*shape, n=n)]
