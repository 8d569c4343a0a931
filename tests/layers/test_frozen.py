"""`FrozenBatchNorm`: an affine map of each channel, in training as in evaluation."""

import copy

import pytest
import torch
from support import (
    BACKENDS,
    FLOATS,
    LAYOUTS,
    as_numpy,
    assert_close,
    expected_step,
    make,
    parameter_dtype,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn


def trained(num_features=5, **settings):
    """Return a frozen layer with the numbers of a trained one."""
    layer = bn.FrozenBatchNorm(num_features, **settings)
    source = nn.BatchNorm1d(num_features)
    with torch.no_grad():
        for values in (source.weight, source.bias, source.running_mean):
            values.normal_()
        source.running_var.uniform_(0.5, 2)
        source.num_batches_tracked.fill_(7)
    layer.load_state_dict(source.state_dict())
    return layer


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_reference_and_nothing_moves(dtype, layout, backend, training):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    layer = trained(channel_dim=channel_dim, activation="gelu", dtype=parameter_dtype(dtype))
    before = copy.deepcopy(layer.state_dict())
    x, _, _, residual, dy = make(shape, channel_dim, memory_format, dtype)
    leaves = [v.clone().requires_grad_() for v in (x, residual)]
    with bn.backend(backend):
        y = layer.train(training)(*leaves)
    dx, dresidual = torch.autograd.grad(y, leaves, dy)
    running = [as_numpy(v) for v in (layer.running_mean, layer.running_var)]
    expected = expected_step(
        x, layer.weight, layer.bias, residual, dy, "gelu", axis=channel_dim, running=running
    )
    for mine, truth in zip((y, dx, dresidual), (*expected[:2], expected[4]), strict=True):
        assert mine.dtype == dtype
        assert_close(mine, truth, dtype)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_gradients_of_first_and_second_order():
    layer = trained(3, eps=0.1, activation="gelu").double()
    inputs = [torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(layer, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_nothing_learns_whatever_is_asked_of_the_module():
    layer = trained(3)
    before = copy.deepcopy(layer.state_dict())
    model = nn.Sequential(nn.Linear(3, 3), layer)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_any_batch_will_do():
    layer = trained(3)
    for x in (torch.randn(1, 3), torch.empty(0, 3), torch.full((2, 3), torch.nan)):
        torch.testing.assert_close(layer(x), layer.eval()(x), equal_nan=True)
        layer.train()
    x, mask = torch.randn(6, 3), torch.arange(6) < 2
    assert torch.equal(layer(x, mask=mask), layer(x))


def test_settings_may_be_others():
    layer = bn.FrozenBatchNorm(3, update="training", ghost_size=2)  # normalizes by what it tracks
    x = torch.randn(8, 3) + 2
    y = layer(x)
    torch.testing.assert_close(y, F.batch_norm(x, torch.zeros(3), torch.ones(3)))
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
    with pytest.raises(ValueError, match="needs track_running_stats=True"):
        bn.FrozenBatchNorm(3, track_running_stats=False)
    assert bn.FrozenBatchNorm(3, affine=False).weight is None


def test_repr_and_what_it_is():
    layer = bn.FrozenBatchNorm(3)
    assert repr(layer).endswith("track_running_stats=True, statistics='running', update='never')")
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not any(p.requires_grad for p in copy.deepcopy(layer).parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_goes_under_a_checkpoint(use_reentrant):
    layer, x = trained(3), torch.randn(8, 3, requires_grad=True)
    dy = torch.randn(8, 3)
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(dy)
    torch.testing.assert_close(x.grad, expected)


def test_per_sample_gradients():
    model = nn.Sequential(nn.Linear(4, 3), trained(3), nn.Linear(3, 2))
    parameters, x = {n: p.detach() for n, p in model.named_parameters()}, torch.randn(5, 4)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for at, example in enumerate(x):
        expected = torch.func.grad(loss)(parameters, example)
        for name, values in expected.items():
            torch.testing.assert_close(found[name][at], values, rtol=1e-4, atol=1e-5)


def test_a_full_graph_gives_the_same():
    torch._dynamo.reset()
    layer, x, dy = trained(3, activation="relu"), torch.randn(8, 3), torch.randn(8, 3)
    found = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        found.append([y, *torch.autograd.grad(y, leaf, dy)])
    torch.testing.assert_close(*found)
