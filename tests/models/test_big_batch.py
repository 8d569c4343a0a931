"""Big batches in parts: loss, gradients and running statistics of one pass, to rounding."""

import copy

import pytest
import torch
from models.holding import attributes
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

N, SIZES = 12, [5, 1, 4, 2]


class Network(nn.Module):
    """Three batch norms, of ours and of torch; a residual connection; dropout if asked for."""

    def __init__(self, dropout=0.0, use_checkpoint=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.first, self.second = nn.BatchNorm2d(4), bn.BatchNorm2d(4, activation="relu")
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.third = bn.BatchNorm2d(4, momentum=None, activation="silu")
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 2)
        self.use_checkpoint = use_checkpoint

    def block(self, x):
        return self.third(
            self.conv(self.second(self.stem(x))), residual=x[:, :1].expand(-1, 4, -1, -1)
        )

    def forward(self, x):
        x = torch.cat([x[:, :1], self.first(torch.tanh(self.stem(x)))[:, :2]], 1)
        if self.use_checkpoint is None:
            z = self.block(x)
        else:
            z = checkpoint(self.block, x, use_reentrant=self.use_checkpoint)
        return self.head(self.dropout(z).mean((2, 3)))


def loss(model, part):
    """Return the sum of the squares, divided by the number of examples in the big batch."""
    return (model(part) - 1).square().sum() / N


def images():
    return torch.randn(N, 3, 4, 4, dtype=torch.float64)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(actual, expected):
    torch.testing.assert_close(gradients(actual), gradients(expected), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)


def compare(model, x, parts, loss=loss, **options):
    """Assert that parts give what one pass without checkpoints gives, and return the report."""
    whole, before = copy.deepcopy(model), attributes(model)
    whole.use_checkpoint = None
    expected = loss(whole, x)
    expected.backward()
    report = bn.big_batch(model, parts, loss, **options)
    assert report.loss == pytest.approx(expected.item(), rel=1e-12)
    assert_same(model, whole)
    assert attributes(model) == before
    return report


@pytest.mark.parametrize("sizes", [SIZES, [N], [1] * N, [6, 0, 6]], ids=str)
def test_a_network_of_three_with_a_residual_connection(sizes):
    x = images()
    report = compare(Network().double(), x, x.split(sizes))
    assert report.done == ["first", "second", "third"]
    assert report.forward_passes <= 3
    assert report.backward_passes <= 4


def test_what_accumulation_gives_is_another_gradient():
    model, x = Network().double(), images()
    whole = copy.deepcopy(model)
    loss(whole, x).backward()
    for part in x.split(4):
        loss(model, part).backward()
    difference = model.stem.weight.grad - whole.stem.weight.grad
    assert difference.norm() > 0.05 * whole.stem.weight.grad.norm()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_chain_of_n_takes_n_passes_and_n_and_one_back(depth):
    chain = [m for _ in range(depth) for m in (nn.Linear(3, 3), bn.BatchNorm(3), nn.Sigmoid())]
    x = torch.randn(N, 3, dtype=torch.float64)
    report = compare(nn.Sequential(*chain).double(), x, x.split(4))
    assert (report.forward_passes, report.backward_passes) == (depth, depth + 1)
    assert repr(report).startswith(f"{depth} pooled: ")
    assert report.to_dict()["backward_passes"] == depth + 1


def test_layers_side_by_side_take_the_passes_of_one():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(bn.BatchNorm(3) for _ in range(5))

        def forward(self, x):
            return sum((norm(x * at) * x.cos()).sigmoid() for at, norm in enumerate(self.norms, 1))

    x = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)
    report = compare(Branches().double(), x, x.detach().split(4))
    assert (report.forward_passes, report.backward_passes) == (2, 1)
    leaf = x.detach().requires_grad_()
    report = compare(
        Branches().double(), leaf, [part.clone().requires_grad_() for part in x.split(4)]
    )
    assert (report.forward_passes, report.backward_passes) == (2, 2)


def test_dropout_draws_the_same_in_each_pass_and_what_one_pass_would():
    model, drawn = Network(dropout=0.5).double(), []
    model.dropout.register_forward_hook(lambda m, x, y: drawn.append((y != 0) | (x[0] == 0)))
    x, seed = images(), torch.get_rng_state()
    report = bn.big_batch(model, x.split(4), loss)
    after, passes = torch.get_rng_state(), report.forward_passes + report.backward_passes
    assert len(drawn) == 3 * passes
    for at in range(3):
        assert all(torch.equal(mask, drawn[at]) for mask in drawn[at::3])
        assert 0.3 < drawn[at].double().mean() < 0.7
    assert not torch.equal(drawn[0], drawn[1])
    torch.set_rng_state(seed)
    for part in x.split(4):  # an ordinary loop draws these masks, and no more
        loss(model, part)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(*pair) for pair in zip(drawn[-3:], drawn[:3], strict=True))


def test_with_the_masks_that_were_drawn_it_is_one_pass():
    class Masked(nn.Dropout):
        masks = None

        def forward(self, x):
            return x * self.masks if self.masks is not None else super().forward(x)

    model, masks = Network().double(), []
    model.dropout = Masked(0.5)
    whole = copy.deepcopy(model)
    model.dropout.register_forward_hook(lambda m, x, y: masks.append(2.0 * (y != 0)))
    x = images()
    bn.big_batch(model, x.split(4), loss)
    whole.dropout.masks = torch.cat(masks[-3:])
    loss(whole, x).backward()
    assert_same(model, whole)


def test_gradients_that_are_there_are_added_to():
    model, x = Network().double(), images()
    before = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    whole = copy.deepcopy(model)
    for module in (model, whole):
        for name, p in module.named_parameters():
            p.grad = None if name.startswith("head") else before[name].clone()
    loss(whole, x).backward()
    bn.big_batch(model, x.split(4), loss)
    assert_same(model, whole)


def test_a_parameter_without_a_gradient_keeps_what_it_had():
    model = nn.Sequential(bn.BatchNorm(3), nn.Linear(3, 3)).double()
    unused = model[1].weight
    unused.grad = kept = torch.ones_like(unused)
    bn.big_batch(model, torch.randn(N, 3).double().split(4), lambda m, x: m[0](x).sigmoid().sum())
    assert unused.grad is kept
    assert model[1].bias.grad is None


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # without a gradient
class TestCallsOfALayer:
    @pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm])
    @pytest.mark.parametrize("use_checkpoint", [None, False, True])
    def test_one_that_is_used_twice(self, norm, use_checkpoint):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.linear = norm(3), nn.Linear(3, 3)
                self.use_checkpoint = use_checkpoint

            def forward(self, x):
                if self.use_checkpoint is None:
                    return self.twice(x)
                return checkpoint(self.twice, x, use_reentrant=self.use_checkpoint)

            def twice(self, x):
                return self.norm(self.linear(torch.tanh(self.norm(x)))).sigmoid()

        x = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)
        report = compare(Twice().double(), x, x.detach().requires_grad_().split(SIZES))
        assert (report.forward_passes, report.backward_passes) == (2, 3)

    @pytest.mark.parametrize("use_checkpoint", [False, True])
    def test_a_checkpoint_is_recomputed_with_the_moments_of_all(self, use_checkpoint):
        x = images()
        model = Network(use_checkpoint=use_checkpoint).double()
        compare(model, x, x.split(SIZES))

    def test_parts_that_call_it_more_often_than_others(self):
        layer = bn.BatchNorm(3).double()

        def loss(model, part):
            return sum(model(x).sigmoid().sum() for x in part)

        a, b, c = torch.randn(3, 4, 3, dtype=torch.float64)
        whole = copy.deepcopy(layer)
        loss(whole, [torch.cat([a, b]), c]).backward()
        bn.big_batch(layer, [[a, c], [b]], loss)
        assert_same(layer, whole)


LAYERS = {
    "masked": lambda: bn.BatchNorm(3),
    "correction": lambda: bn.BatchNorm(3, correction=1, momentum=0.3),
    "renormalized": lambda: bn.BatchRenorm(
        3, r_max=1.2, d_max=0.1, warmup_batches=0, r_batches=0, d_batches=0
    ),
    "no affine": lambda: bn.BatchNorm(3, affine=False),
    "no statistics": lambda: bn.BatchNorm(3, track_running_stats=False),
    "ghost": lambda: bn.GhostBatchNorm(3, ghost_size=4),
    "frozen": lambda: bn.FrozenBatchNorm(3),
    "evaluation": lambda: bn.BatchNorm(3).eval(),
    "by the running ones": lambda: bn.BatchNorm(3, statistics="running"),
    "follows only with a gradient": lambda: bn.BatchNorm(3, update="grad"),
    "banked": lambda: bn.BankedBatchNorm(3, banks=("a", "b")),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.norm, self.after = nn.Linear(3, 3), LAYERS[kind](), nn.Linear(3, 3)

        def forward(self, x, extra):
            return self.after(self.norm(self.before(x), None, *extra).tanh())

    extra = []
    if kind == "masked":
        extra = [torch.arange(N) % 3 > 0]
    elif kind == "banked":
        extra = [None, torch.arange(N) % 2]

    def loss(model, part):
        x, *rest = part
        return model(x, rest).square().sum() / N

    x = torch.randn(N, 3, dtype=torch.float64)
    parts = [
        (x[at : at + 4], *(v if v is None else v[at : at + 4] for v in extra)) for at in (0, 4, 8)
    ]
    compare(Around().double(), (x, *extra), parts, loss)


def test_layers_left_out_are_normalized_by_the_part_and_follow_once():
    model = nn.Sequential(bn.BatchNorm(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    plain, x = copy.deepcopy(model), torch.randn(N, 3, dtype=torch.float64)
    bn.big_batch(model, x.split(4), loss, where="0")
    whole = bn.BatchNorm(3).double()
    for part in plain[1](whole(x)).split(4):
        plain[2](part)
    torch.testing.assert_close(model[0].state_dict(), whole.state_dict())
    torch.testing.assert_close(model[2].state_dict(), plain[2].state_dict())
    assert model[2].num_batches_tracked == 3


def test_what_else_remembers_sees_one_pass():
    model = nn.Sequential(spectral_norm(nn.Linear(3, 3)), bn.BatchNorm(3), nn.Tanh()).double()
    twin, x = copy.deepcopy(model), torch.randn(N, 3, dtype=torch.float64)
    report = bn.big_batch(model, x.split(4), loss)
    for part in x.split(4):
        twin[0](part)
    torch.testing.assert_close(model[0].state_dict(), twin[0].state_dict(), rtol=0, atol=0)
    assert (report.forward_passes, report.backward_passes) == (1, 2)


def test_fewer_passes_are_an_approximation():
    x, found = images(), []
    model = Network().double()
    for most in (None, 3, 1):
        twin = copy.deepcopy(model)
        report = bn.big_batch(twin, x.split(4), loss, max_passes=most)
        assert most is None or max(report.forward_passes, report.backward_passes) <= most
        found.append(twin.stem.weight.grad)
    errors = [(gradient - found[0]).norm() / found[0].norm() for gradient in found[1:]]
    assert errors[0] < errors[1] < 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_end_too_and_update_nothing(bad):
    model, x = Network().double(), images()
    x[3] = bad
    before = copy.deepcopy(model.state_dict())
    report = bn.big_batch(model, x.split(4), loss)
    assert report.loss != report.loss
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [2, 5, 17])
def test_an_error_half_way_leaves_everything(error, call):
    model, x, calls = Network().double(), images(), []
    loss(model, x).backward()
    before, grads = attributes(model), gradients(model)
    values = copy.deepcopy([grads, model.state_dict()])

    def failing(model, part):
        calls.append(part)
        if len(calls) == call:
            raise error
        return loss(model, part)

    with pytest.raises(error):
        bn.big_batch(model, x.split(4), failing)
    assert attributes(model) == before
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    torch.testing.assert_close([grads, model.state_dict()], values, rtol=0, atol=0)


def test_what_cannot_be_is_an_error():
    layer, x = bn.BatchNorm(3), torch.randn(N, 3)
    with pytest.raises(ValueError, match="no micro-batches"):
        bn.big_batch(layer, [], loss)
    with pytest.raises(ValueError, match="max_passes is 0"):
        bn.big_batch(layer, [x], loss, max_passes=0)
    for norm in (bn.SyncBatchNorm(3), nn.SyncBatchNorm(3)):
        with pytest.raises(RuntimeError, match=r"synchronized .* \(bn\.unsynchronize\)"):
            bn.big_batch(nn.Sequential(norm), [x], loss)

    def penalty(model, part):
        with torch.enable_grad():
            part = part.clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(part).sigmoid().sum(), part, create_graph=True)
            return slope.square().sum()

    with pytest.raises(RuntimeError, match="no gradient of a gradient"):
        bn.big_batch(layer, [x], penalty)


def test_a_compiled_model_runs_as_it_was_written():
    torch._dynamo.reset()
    model, x = (
        nn.Sequential(nn.Linear(3, 3), bn.BatchNorm(3), nn.Tanh()).double(),
        torch.randn(N, 3),
    )
    whole, x = copy.deepcopy(model), x.double()
    loss(whole, x).backward()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    report = bn.big_batch(compiled, x.split(4), loss)
    assert_same(model, whole)
    assert report.done == ["_orig_mod.1"]


def test_the_gradient_scaler_scales_it_like_any_loss():
    model, x = Network().double(), images()
    whole = copy.deepcopy(model)
    loss(whole, x).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    bn.big_batch(model, x.split(4), lambda model, part: scaler.scale(loss(model, part)))
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
    assert_same(model, whole)
