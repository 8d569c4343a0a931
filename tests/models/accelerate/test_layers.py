"""All kinds of batch norms, batches and types, fused and saving memory, against the model."""

import copy

import pytest
import torch
from models.accelerate.agreement import assert_agrees, assert_same, step
from models.accelerate.networks import Network, chained, doubles, images
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.kernels import native


def block(m, x, r):
    return F.relu(m.norms[0](x) + r)


def activated(m, x):
    return F.relu(m.norms[0](x)), m.norms[1](x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": 0.0},
        {"momentum": 1.0, "eps": 0.5},
    ],
    ids=str,
)
def test_settings(options, training):
    model = Network(block, lambda c: nn.BatchNorm2d(c, **options)).train(training)
    assert assert_agrees(model, images()) == ["add + relu"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_average_over_all_batches():
    """Its momentum is a number that torch's layer reads from a tensor: it is in no graph."""
    model = Network(block, lambda c: nn.BatchNorm2d(c, momentum=None))
    assert assert_agrees(model, images(), steps=3) == []


class Held(Network):
    """Statistics stay as they are in training: by `eval()` of the layers, as many models do it."""

    def train(self, mode=True):
        super().train(mode)
        self.norms.eval()
        return self


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_layers(affine):
    model = Held(block).train()
    model.norms.requires_grad_(affine)
    assert assert_agrees(model, images()) == ["add + relu"]


@pytest.mark.parametrize("parts", [{}, {"affine": False}, {"statistics": False}], ids=str)
def test_layers_frozen_by_ours(parts):
    model = Network(block)
    bn.freeze(model, **parts)
    assert_agrees(model, images())


CHANNELS_LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize(
    ("norm", "function", "inputs"),
    [
        (nn.BatchNorm1d, activated, images(7, 4, n=1)),
        (nn.BatchNorm1d, activated, images(7, 4, 5, n=1)),
        (nn.BatchNorm3d, activated, images(2, 4, 3, 4, 5, n=1)),
        (nn.BatchNorm2d, block, [v.to(**CHANNELS_LAST) for v in images()]),
        (nn.BatchNorm2d, block, [images()[0].to(**CHANNELS_LAST), images()[0]]),
        (nn.BatchNorm2d, block, [images()[0], images()[0].to(**CHANNELS_LAST)]),
        (nn.BatchNorm2d, lambda m, x, r: F.relu(m.norms[0](x[:1].expand_as(r)) + r), images()),
        (nn.BatchNorm2d, lambda m, x, r: block(m, x[..., ::2], r[..., ::2]), images()),
        (nn.BatchNorm2d, lambda m, x, r: block(m, x[:0], r[:0]), images()),
        (nn.BatchNorm1d, activated, images(3, 4, 0, n=1)),
        (nn.BatchNorm2d, block, [3 + 0 * v for v in images()]),
    ],
    ids=[
        "NC", "NCL", "NCDHW", "NHWC", "NHWC + NCHW", "NCHW + NHWC", "expanded", "strided",
        "empty", "no positions", "constant",
    ],
)  # fmt: skip
def test_batches(norm, function, inputs):
    assert_agrees(Network(function, norm), inputs, steps=1)


def test_batches_of_other_orders_of_dimensions():
    """The results lie in memory as the batches do, as Dynamo has them, too."""

    def function(m, x):
        y = m.norms[0](x.transpose(1, 2))
        return F.relu(y).contiguous(), m.norms[1](x.transpose(1, 2)).transpose(1, 2).reshape(-1)

    assert_agrees(Network(function, nn.BatchNorm1d), images(3, 6, 4, n=1), steps=1)


def test_one_value_per_channel():
    model = Network(block)
    inputs = images(1, 4, 1, 1)
    errors = []
    for run in (torch.compile(model, backend="eager"), bn.accelerate(model)):
        with pytest.raises(Exception, match="Expected more than 1 value per channel") as raised:
            run(*inputs)
        errors.append(raised.type)
    assert errors[0] is errors[1]  # Dynamo says it, whatever the backend
    assert_agrees(model.eval(), inputs, steps=1)


def test_a_batch_that_is_not_finite_moves_no_statistics():
    """As of our layers, and other than of torch's: what comes out is the same."""
    model = Network(block)
    x, r = images()
    x[0, 0, 0, 0] = torch.inf
    expected, actual = step(copy.deepcopy(model), (x, r)), step(bn.accelerate(model), (x, r))
    assert not expected["buffer 0"].isfinite().all()
    assert all(v.isfinite().all() for name, v in actual.items() if "buffer" in name)
    assert_same(*({k: v for k, v in f.items() if "output" in k} for f in (actual, expected)), 1e-6)


def test_functions():
    def function(m, x, r):
        n = m.norms[0]
        mean, var = n.running_mean, n.running_var
        weight, bias = r[0, :, 0, 0].exp(), r[1, :, 1, 1]
        return [
            F.relu(y + r)
            for y in (
                F.batch_norm(x, None, None, weight, bias, True),
                F.batch_norm(x, mean, var, n.weight, None, True, 0.3, 0.01),
                F.batch_norm(x, mean, var, training=True, momentum=0.0),
                torch.batch_norm(x, n.weight, n.bias, mean, var, True, 0.2, 1e-3, False),
                torch.batch_norm(x, None, None, None, None, training=True, momentum=0.2, eps=1e-3,
                                 cudnn_enabled=True),
                F.batch_norm(x, mean, var),
                F.batch_norm(x, *m.parts, None, weight, True),
                F.batch_norm(x, *m.parts.new_ones(4, 2).T, weight[:1].expand(4), r[0, 0, 0, :4]),
                F.batch_norm(x.detach(), *m.parts),
            )
        ]  # fmt: skip

    model = Network(function)
    model.register_buffer("parts", torch.rand(2, 4))
    assert assert_agrees(model, images()) == ["add + relu"] * 9


@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"ghost_size": 2}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_our_own_layers(options, training):
    def function(m, x, r):
        mask = x[:, 0] > -1
        return (
            F.relu(m.norms[0](m.convs[0](x)) + r),
            m.norms[1](x, r, mask),
            m.convs[1](F.relu(m.norms[2](x, mask=mask))),
        )

    model = Network(function, lambda c: bn.BatchNorm2d(c, **options)).train(training)
    assert_agrees(model, images(6, 4, 5, 5), error=1e-11)


def test_without_kernels(monkeypatch):
    """Those of torch are called as they were, or, to save memory, our own for any device."""
    monkeypatch.setattr(native, "takes", lambda x: False)
    inputs = doubles()
    with bn.backend("eager"):
        for save_memory in (False, True):
            model = Network(chained).double()
            expected = step(copy.deepcopy(model), inputs)
            assert_same(
                step(bn.accelerate(model, save_memory=save_memory), inputs), expected, 1e-12
            )
