"""`batch_norm(x, State(...))`: a pure function of the batch and the running statistics."""

import itertools

import pytest
import torch
from support import BACKENDS, as_numpy, assert_close, expected_running, weights_of
from torch import nn

import batchnorm as bn

#: What a call may be asked for besides.
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "correction": 1, "activation": "gelu"},
    {"ghost_size": 3},
    {"renorm": (1.2, 0.1)},
    {"ghost_size": 3, "renorm": (1.2, 0.1), "channel_dim": -1},
]


def fresh(channels=4, dtype=torch.float32):
    """Return a state that has seen some batches."""
    mean, var = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5
    return bn.State(mean, var, torch.tensor(2))


def versions(*tensors):
    return [v._version for v in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_gives_what_the_other_call_leaves_and_changes_nothing(backend, options, training, masked):
    x, residual = torch.randn(7, 4, 4), torch.randn(7, 4, 4)
    weight, bias = torch.randn(4), torch.randn(4)
    mask = weights_of(x.shape, 1) if masked else None
    given = fresh()
    options = {**options, "training": training, "mask": mask, "residual": residual}
    copies = [v.clone() for v in (x, residual, weight, bias, *given)]
    before = versions(x, residual, weight, bias, *given)
    with bn.backend(backend):
        y, after = bn.batch_norm(x, given, weight=weight, bias=bias, **options)
        assert versions(x, residual, weight, bias, *given) == before
        assert all(map(torch.equal, (x, residual, weight, bias, *given), copies))
        *running, count = (v.clone() for v in given)
        expected = bn.batch_norm(x, *running, weight, bias, num_batches_tracked=count, **options)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, bn.State(*running, count))
    assert [v.dtype for v in after] == [v.dtype for v in given]
    if training:
        rate = 1 / 3 if (m := options.get("momentum", 0.1)) is None else m
        truth = expected_running(
            given[:2], x, rate, axis=options.get("channel_dim", 1), weights=mask
        )
        for mine, wanted in zip(after[:2], truth, strict=True):
            assert_close(mine, wanted, torch.float32, "sum")
        assert after.num_batches_tracked == 3
    else:
        assert all(map(torch.equal, after, given))


def test_nobody_has_to_count():
    _, after = bn.batch_norm(torch.randn(5, 4), bn.State(*fresh()[:2]), training=True)
    assert after.num_batches_tracked is None
    with pytest.raises(ValueError, match="pass num_batches_tracked"):
        bn.batch_norm(torch.randn(5, 4), bn.State(*fresh()[:2]), training=True, momentum=None)


@pytest.mark.parametrize("bad", ["empty", "nan", "masked", "one", "skipped"])
def test_a_batch_that_updates_nothing_gives_the_same_state(bad):
    given = fresh()
    x = torch.randn({"empty": 0, "one": 1, "skipped": 1}.get(bad, 6), 4)
    if bad == "nan":
        x[2, 1] = torch.nan
    mask = torch.zeros(6) if bad == "masked" else None
    choice = "skip" if bad == "skipped" else "running"
    _, after = bn.batch_norm(x, given, training=True, mask=mask, on_small_batch=choice)
    assert all(map(torch.equal, after, given))


@pytest.mark.parametrize(
    "more",
    [{"running_var": torch.ones(4)}, {"num_batches_tracked": torch.tensor(1)}, {"inplace": True}],
    ids=str,
)
def test_what_is_in_the_state_is_not_given_twice(more):
    with pytest.raises(ValueError, match="with a State the function is pure"):
        bn.batch_norm(torch.randn(5, 4), fresh(), **more)


def test_no_gradient_flows_through_the_moments_that_are_tracked():
    x = torch.randn(5, 4, requires_grad=True)
    y, after = bn.batch_norm(x, fresh(), training=True)
    assert y.requires_grad
    assert not any(v.requires_grad for v in after)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_vmap_over_batches(options, shared):
    x, weight = torch.randn(3, 7, 4, 4), torch.randn(4)
    states = [fresh() for _ in range(3)]
    given = states[0] if shared else bn.State(*map(torch.stack, zip(*states, strict=True)))

    def function(x, state):
        return bn.batch_norm(x, state, weight=weight, training=True, **options)

    y, after = torch.func.vmap(function, in_dims=(0, None if shared else 0))(x, given)
    for at in range(3):
        expected, state = function(x[at], states[0 if shared else at])
        torch.testing.assert_close(y[at], expected)
        torch.testing.assert_close(bn.State(*(v[at] for v in after)), state)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_each_batch_by_vmap_are_those_of_autograd(options):
    x, dy = torch.randn(2, 3, 7, 4, 4, dtype=torch.float64)
    given, weight = fresh(dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def loss(weight, x, dy):
        y, after = bn.batch_norm(x, given, weight=weight, training=True, **options)
        return (y * dy).sum(), after

    by_weight, after = torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(None, 0, 0))(
        weight, x, dy
    )
    by_x = torch.func.vmap(torch.func.grad(lambda *a: loss(*a)[0], argnums=1), (None, 0, 0))(
        weight, x, dy
    )
    for at in range(3):
        leaves = weight.clone().requires_grad_(), x[at].clone().requires_grad_()
        value, state = loss(*leaves, dy[at])
        expected = torch.autograd.grad(value, leaves)
        torch.testing.assert_close((by_weight[at], by_x[at]), expected)
        torch.testing.assert_close(bn.State(*(v[at] for v in after)), state)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jacobians_in_both_modes_are_that_of_autograd(options):
    x, given = torch.randn(5, 4, dtype=torch.float64), fresh(dtype=torch.float64)

    def function(x):
        return bn.batch_norm(x, given, training=True, eps=0.1, **options)[0]

    expected = torch.autograd.functional.jacobian(function, x)
    torch.testing.assert_close(torch.func.jacrev(function)(x), expected)
    torch.testing.assert_close(torch.func.jacfwd(function)(x), expected)


class Net(nn.Module):
    """A model that hands its state on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.weight, self.bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

    def forward(self, x, state):
        return bn.batch_norm(
            self.linear(x), state, weight=self.weight, bias=self.bias, training=True,
            activation="relu", ghost_size=4,
        )  # fmt: skip


def test_functional_call_with_gradients_of_each_batch():
    net, x, dy, given = Net(), torch.randn(3, 8, 3), torch.randn(3, 8, 4), fresh()
    parameters = dict(net.named_parameters())

    def loss(parameters, x, dy):
        y, after = torch.func.functional_call(net, parameters, (x, given))
        return (y * dy).sum(), after

    found, after = torch.func.vmap(torch.func.grad(loss, has_aux=True), (None, 0, 0))(
        {name: p.detach() for name, p in parameters.items()}, x, dy
    )
    for at in range(3):
        y, state = net(x[at], given)
        expected = torch.autograd.grad(y, [*parameters.values()], dy[at])
        for name, wanted in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][at], wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bn.State(*(v[at] for v in after)), state)


def test_many_steps_are_those_of_a_layer():
    layer, state = bn.BatchNorm(4), bn.State(torch.zeros(4), torch.ones(4), torch.tensor(0))
    for x in torch.randn(5, 8, 4) + 3:
        y, state = bn.batch_norm(x, state, training=True)
        torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(state, bn.State(*layer.buffers()))
    y, same = bn.batch_norm(x, state)
    torch.testing.assert_close(y, layer.eval()(x))
    assert same is state


def test_a_full_graph_gives_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(bn.batch_norm, fullgraph=True, backend="aot_eager")
    given, found = fresh(), []
    x, dy = torch.randn(7, 4), torch.randn(7, 4)
    copies = [v.clone() for v in given]
    for call in (bn.batch_norm, compiled):
        leaf = x.clone().requires_grad_()
        y, after = call(leaf, given, training=True, renorm=(1.2, 0.1))
        found.append([y, *after, *torch.autograd.grad(y, leaf, dy)])
    for truth, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth)
    assert all(map(torch.equal, given, copies))


def test_statistics_keep_their_type():
    for kept, batch in itertools.product(
        (torch.float32, torch.float64), (torch.bfloat16, torch.float64)
    ):
        given, x = fresh(dtype=kept), (torch.randn(50, 4) + 3).to(batch)
        _, after = bn.batch_norm(x, given, training=True)
        assert after.running_mean.dtype == after.running_var.dtype == kept
        truth = expected_running(given[:2], as_numpy(x))
        for mine, wanted in zip(after[:2], truth, strict=True):
            assert_close(mine, wanted, torch.float32, "sum")
