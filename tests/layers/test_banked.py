"""`BankedBatchNorm`: each bank by itself, and a mixed batch as if its parts had come alone."""

import contextlib
import copy
import io
import threading

import pytest
import torch
from support import BACKENDS, LAYOUTS, make, parameter_dtype, weights_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

BANKS = ("photo", "sketch", "cartoon")


def trained(layer=bn.BatchNorm, channels=5, **settings):
    """Return a layer with numbers that are not those it began with."""
    layer = layer(channels, **settings)
    with torch.no_grad():
        for values in (layer.weight, layer.bias, layer.running_mean):
            values.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(7)
    return layer


def banked(banks=BANKS, **settings):
    """Return a layer with three banks of numbers of their own."""
    layer = bn.BankedBatchNorm(5, banks=banks, **settings)
    for name in layer.names:
        layer[name].load_state_dict(trained().state_dict())
    return layer


class TestOneBank:
    def test_the_first_is_the_default(self):
        layer, x = banked(), torch.randn(8, 5)
        expected = copy.deepcopy(layer["photo"])(x)
        assert torch.equal(layer(x), expected)
        assert [layer[name].num_batches_tracked.item() for name in BANKS] == [8, 7, 7]

    @pytest.mark.parametrize("name", BANKS)
    def test_is_chosen_by_the_call_or_around_it(self, name):
        layer, x = banked(), torch.randn(8, 5)
        expected = copy.deepcopy(layer[name])(x)
        twin = copy.deepcopy(layer)
        assert torch.equal(layer(x, domain=name), expected)
        with bn.domain(name):
            assert torch.equal(twin(x), expected)
        torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)
        moved = [layer[other].num_batches_tracked == 8 for other in BANKS]
        assert moved == [other == name for other in BANKS]

    def test_the_call_goes_before_what_is_around_it_and_the_inner_before_the_outer(self):
        layer, x = banked().eval(), torch.randn(8, 5)
        with bn.domain("sketch"):
            assert torch.equal(layer(x, domain="photo"), layer["photo"](x))
            with bn.domain("cartoon"):
                assert torch.equal(layer(x), layer["cartoon"](x))
            assert torch.equal(layer(x), layer["sketch"](x))
            with pytest.raises(KeyError), bn.domain("cartoon"):
                raise KeyError
            assert torch.equal(layer(x), layer["sketch"](x))
        assert torch.equal(layer(x), layer["photo"](x))

    def test_every_layer_of_a_model_hears_it(self):
        model = nn.Sequential(nn.Linear(5, 5), banked(), nn.ReLU(), banked()).eval()
        x = torch.randn(8, 5)
        plain = nn.Sequential(model[0], model[1]["sketch"], model[2], model[3]["sketch"])
        with bn.domain("sketch"):
            assert torch.equal(model(x), plain(x))

    def test_residual_and_mask_reach_it(self):
        layer, x = banked(activation="relu"), torch.randn(8, 5, 4)
        residual, mask = torch.randn(8, 5, 4), weights_of((8, 5, 4), 1)
        expected = copy.deepcopy(layer["sketch"])(x, residual, mask)
        assert torch.equal(layer(x, residual, mask, "sketch"), expected)


def parts(layer, x, residual, mask, dy, index, dim):
    """Return what each bank gives of its own examples: y, dx, dresidual and by its parameters."""
    y, dx, dresidual = (torch.zeros_like(x) for _ in range(3))
    parameters = []
    for at, name in enumerate(layer.names):
        rows = (index == at).nonzero().squeeze(1)
        leaves = [v.index_select(dim, rows).requires_grad_() for v in (x, residual)]
        part = layer[name](*leaves, None if mask is None else mask[rows])
        dx_, dresidual_, *own = torch.autograd.grad(
            part, [*leaves, layer[name].weight, layer[name].bias], dy.index_select(dim, rows)
        )
        for whole, share in zip((y, dx, dresidual), (part.detach(), dx_, dresidual_), strict=True):
            whole.index_copy_(dim, rows, share)
        parameters += own
    return y, dx, dresidual, *parameters


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"ghost_size": 2, "eps": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_is_each_bank_on_its_own_examples(layout, masked, settings, dtype):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    x, _, _, residual, dy = make(shape, channel_dim, memory_format, dtype)
    dim = 0 if channel_dim else 1
    index = torch.arange(shape[dim]) % 2 * 2  # nothing for the second bank
    if shape[dim] > 20:
        index = torch.randint(0, 3, (shape[dim],))
    mask = weights_of(shape, channel_dim) if masked else None
    layer = banked(
        channel_dim=channel_dim, activation="silu", dtype=parameter_dtype(dtype), **settings
    )
    twin = copy.deepcopy(layer)
    leaves = [v.clone().requires_grad_() for v in (x, residual)]
    y = layer(*leaves, mask, index)
    found = torch.autograd.grad(
        y, [*leaves, *layer.parameters()], dy, allow_unused=True, materialize_grads=True
    )
    expected = parts(twin, x, residual, mask, dy, index, dim)
    for mine, truth in zip((y, *found), expected, strict=True):
        torch.testing.assert_close(mine, truth)
    assert y.dtype == dtype
    used = [bool((index == at).any()) for at in range(3)]
    for name, there in zip(BANKS, used, strict=True):
        assert layer[name].num_batches_tracked == 7 + there
        assert twin[name].num_batches_tracked == 7 + there
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


class TestMixed:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_in_evaluation_each_example_alone_gives_the_same(self, backend):
        layer, x = banked().eval(), torch.randn(9, 5, 4)
        index = torch.randint(0, 3, (9,))
        with bn.backend(backend):
            y = layer(x, domain=index)
            for at, example in enumerate(x):
                alone = layer(example[None], domain=BANKS[index[at]])
                torch.testing.assert_close(y[at], alone[0])

    def test_an_index_may_be_around_the_call_and_of_any_integer_type(self):
        layer, x, index = banked().eval(), torch.randn(4, 5), torch.tensor([2, 0, 1, 0])
        expected = layer(x, domain=index)
        for dtype in (torch.int32, torch.uint8):
            with bn.domain(index.to(dtype)):
                assert torch.equal(layer(x), expected)
        assert torch.equal(banked(("a", "b")).eval()(x, domain=index > 0).isfinite(), x == x)

    def test_one_name_for_all_is_that_bank(self):
        layer, x = banked(), torch.randn(8, 5)
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(
            layer(x, domain=torch.ones(8, dtype=torch.int64)), twin(x, domain="sketch")
        )
        torch.testing.assert_close(layer.state_dict(), twin.state_dict())

    def test_no_examples(self):
        layer = banked()
        y = layer(torch.empty(0, 5, 3), domain=torch.empty(0, dtype=torch.int64))
        assert y.shape == (0, 5, 3)
        assert [layer[name].num_batches_tracked.item() for name in BANKS] == [7, 7, 7]

    def test_a_bank_with_one_value_says_which_and_may_skip(self):
        x, index = torch.randn(5, 5), torch.tensor([0, 0, 1, 0, 0])
        model = nn.Sequential(banked())
        message = r"more than 1 value .*\[in '0\.banks\.sketch' of"
        with bn.domain(index), pytest.raises(ValueError, match=message):
            model(x)
        layer = banked(on_small_batch="running")
        expected = copy.deepcopy(layer["sketch"]).eval()(x[2:3])
        assert torch.equal(layer(x, domain=index)[2:3], expected)

    def test_a_mask_of_any_shape_that_broadcasts(self):
        x, index = torch.randn(5, 3, 4) + 1, torch.tensor([0, 1, 0, 1, 1])
        mask = torch.rand(5, 4) > 0.3
        forms = [mask, mask.unsqueeze(1), mask[:1], mask[:, :1], mask[0]]
        for form in forms:
            full = form.squeeze(1) if form.ndim == 3 else form.expand(5, 4)
            found, expected = (
                bn.BankedBatchNorm(3, banks=("a", "b"))(x, mask=m, domain=index)
                for m in (form, full)
            )
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            (torch.zeros(7, dtype=torch.int64), r"of size \(7,\).* each of the 8 examples"),
            (torch.zeros(8), "torch.float32: expected the index"),
            (torch.zeros(8, 1, dtype=torch.int64), r"of size \(8, 1\)"),
            (torch.full((8,), 3), r"from 3 to 3: expected 0 to 2, for photo, sketch, cartoon"),
            (torch.tensor([0, 1, 2, 0, -1, 2, 1, 0]), "from -1 to 2"),
        ],
        ids=str,
    )
    def test_an_index_that_cannot_be(self, index, message):
        with pytest.raises(ValueError, match=message):
            banked()(torch.randn(8, 5), domain=index)


class TestMaking:
    @pytest.mark.parametrize(
        "source",
        [trained(), trained(bn.GhostBatchNorm, ghost_size=4), trained(bn.BatchRenorm, r_max=2.0)],
        ids=lambda layer: type(layer).__name__,
    )
    def test_from_a_trained_layer_every_bank_begins_as_its_copy(self, source):
        source = copy.deepcopy(source).eval()
        layer = bn.BankedBatchNorm.from_layer(source, BANKS)
        assert layer["photo"] is source
        assert not layer.training
        for name in BANKS:
            assert type(layer[name]) is type(source)
            assert repr(layer[name]) == repr(source)
            torch.testing.assert_close(layer[name].state_dict(), source.state_dict())
        layer.train()(torch.randn(8, 5), domain="sketch")  # and goes its own way
        assert [layer[name].num_batches_tracked.item() for name in BANKS] == [7, 8, 7]
        assert layer["sketch"].weight is not source.weight

    def test_shared_affine_parts_stay_shared(self):
        source = trained()
        apart = bn.BankedBatchNorm.from_layer(copy.deepcopy(source), BANKS)
        for layer in (
            bn.BankedBatchNorm(5, banks=BANKS, share_affine=True),
            bn.BankedBatchNorm.from_layer(source, BANKS, share_affine=True),
        ):
            for twin in (layer, copy.deepcopy(layer)):
                assert len(list(twin.parameters())) == 2
                assert twin["cartoon"].weight is twin["photo"].weight
                assert twin["cartoon"].running_mean is not twin["photo"].running_mean
        index, x = torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 5)
        dy = torch.randn(6, 5)
        for each in (layer, apart):
            each(x, domain=index).backward(dy)
        sums = [
            torch.stack([apart[n].get_parameter(p).grad for n in BANKS]).sum(0)
            for p in ("weight", "bias")
        ]
        torch.testing.assert_close([p.grad for p in layer.parameters()], sums)
        assert (
            bn.BankedBatchNorm(5, affine=False, banks=BANKS, share_affine=True)["photo"].weight
            is None
        )

    @pytest.mark.parametrize("share", [False, True])
    def test_a_state_dict_goes_into_another(self, share):
        layer = banked(share_affine=share)
        layer(torch.randn(9, 5), domain=torch.arange(9) % 3)
        stream = io.BytesIO()
        torch.save(layer.state_dict(), stream)
        stream.seek(0)
        again = bn.BankedBatchNorm(5, banks=BANKS, share_affine=share).eval()
        again.load_state_dict(torch.load(stream))
        x = torch.randn(6, 5)
        for twin in (again, copy.deepcopy(layer).eval()):
            assert torch.equal(
                twin(x, domain=torch.arange(6) % 3), layer.eval()(x, domain=torch.arange(6) % 3)
            )
        keys = [key for key in layer.state_dict() if key.startswith("banks.sketch.")]
        assert [key.split(".")[-1] for key in keys] == list(nn.BatchNorm1d(5).state_dict())

    @pytest.mark.parametrize("banks", [(), ("a", "a"), []])
    def test_banks_that_cannot_be(self, banks):
        with pytest.raises(ValueError, match="expected at least one name, and each only once"):
            bn.BankedBatchNorm(3, banks=banks)

    def test_domains_that_cannot_be(self):
        layer = banked()
        with pytest.raises(ValueError, match="'real': expected one of photo, sketch, cartoon"):
            layer(torch.randn(8, 5), domain="real")
        with pytest.raises(TypeError, match="domain is a int"), bn.domain(1):
            pass

    def test_one_name_is_one_bank_and_settings_reach_all(self):
        assert bn.BankedBatchNorm(3, banks="real").names == ("real",)
        layer = bn.BankedBatchNorm(3, 1e-3, banks=("a", "b"), layer=bn.GhostBatchNorm, ghost_size=8)
        assert [(bank.eps, bank.ghost_size) for bank in layer.banks.values()] == [(1e-3, 8)] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
class TestCheckpoint:
    def test_with_a_domain_around_both_or_given_gradients_and_updates_are_right(
        self, use_reentrant
    ):
        model = nn.ModuleList([nn.Linear(5, 5), banked()])
        index, dy = torch.arange(8) % 3, torch.randn(8, 5)
        for which in ("sketch", index):
            for around in (True, False):
                plain, checkpointed = copy.deepcopy(model), copy.deepcopy(model)

                def call(model, x, which=which, around=around):
                    return model[1](model[0](x), domain=None if around else which)

                x = torch.randn(8, 5, requires_grad=True)
                with bn.domain(which if around else "photo"):
                    call(plain, x).backward(dy)
                    y = checkpoint(call, checkpointed, x, use_reentrant=use_reentrant)
                    y.backward(dy)
                torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict())
                for mine, truth in zip(checkpointed.parameters(), plain.parameters(), strict=True):
                    torch.testing.assert_close(mine.grad, truth.grad)

    @pytest.mark.parametrize("around", [None, "photo"])
    def test_two_domains_and_one_backward_pass_wherever_it_runs(self, use_reentrant, around):
        plain = nn.ModuleList([nn.Linear(5, 5), banked(), nn.Linear(5, 5)])
        model, found = copy.deepcopy(plain), []

        def call(model, x):
            return model[2](model[1](model[0](x)))

        start, dy = torch.randn(2, 8, 5), torch.randn(3, 8, 5)
        for under in (False, True):
            xs = start.clone().requires_grad_()
            ys = []
            for x, name in ((xs[0], "sketch"), (xs[1], "cartoon"), (xs[0], None)):
                with contextlib.nullcontext() if name is None else bn.domain(name):
                    ys.append(
                        checkpoint(call, model, x, use_reentrant=use_reentrant)
                        if under
                        else call(plain, x)
                    )
            with contextlib.nullcontext() if around is None else bn.domain(around):
                torch.autograd.backward(torch.stack(ys), dy)
            found.append(xs.grad)
        torch.testing.assert_close(*found)
        torch.testing.assert_close(model.state_dict(), plain.state_dict())
        for mine, truth in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, truth.grad)

    def test_in_a_thread_without_the_context_as_those_of_devices_are(self, use_reentrant):
        layer, x = banked(), torch.randn(8, 5, requires_grad=True)
        twin, dy = copy.deepcopy(layer), torch.randn(8, 5)
        (expected,) = torch.autograd.grad(twin(x, domain="sketch"), x, dy)
        with bn.domain("sketch"):
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
        thread = threading.Thread(target=y.backward, args=[dy])
        thread.start()
        thread.join()
        torch.testing.assert_close(x.grad, expected)
        torch.testing.assert_close(layer.state_dict(), twin.state_dict())

    def test_of_a_call_that_is_long_ago_is_an_error(self, use_reentrant):
        layer, x = banked(), torch.randn(8, 5, requires_grad=True)
        with bn.domain("sketch"):
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
        for _ in range(32):
            layer(torch.randn(8, 5))
        with pytest.raises(RuntimeError, match="not among the last 32, so the domain"):
            y.backward(torch.randn(8, 5))

    def test_a_domain_around_the_backward_pass_alone_is_not_heard(self, use_reentrant):
        layer, x = banked(), torch.randn(8, 5, requires_grad=True)
        twin, dy = copy.deepcopy(layer), torch.randn(8, 5)
        (expected,) = torch.autograd.grad(twin(x), x, dy)
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        with bn.domain("sketch"):
            y.backward(dy)
        torch.testing.assert_close(x.grad, expected)

    def test_without_any_domain_it_is_the_first(self, use_reentrant):
        layer, x = banked(), torch.randn(8, 5, requires_grad=True)
        checkpoint(layer, x, use_reentrant=use_reentrant).backward(torch.randn(8, 5))
        assert layer["photo"].num_batches_tracked == 8


def test_modes_are_those_of_all_banks():
    layer = banked()
    layer.eval()
    assert not any(bank.training for bank in layer.banks.values())
    layer.half()
    assert all(bank.running_mean.dtype == torch.float32 for bank in layer.banks.values())


def test_a_full_graph_gives_the_same():
    torch._dynamo.reset()
    eager = banked(activation="relu")
    layer, x, dy = copy.deepcopy(eager), torch.randn(9, 5), torch.randn(9, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for given, around in (
        (None, None),
        ("sketch", None),
        (None, "cartoon"),
        (None, "sketch"),
    ):
        found = []
        for call in (eager, compiled):
            leaf = x.clone().requires_grad_()
            with contextlib.nullcontext() if around is None else bn.domain(around):
                y = call(leaf, domain=given)
            found.append([y, *torch.autograd.grad(y, leaf, dy)])
        torch.testing.assert_close(*found)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


def test_mixed_batches_keep_their_memory_format():
    layer = bn.BankedBatchNorm(5, banks=("a", "b"))
    x = torch.randn(6, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    y = layer(x, domain=torch.arange(6) % 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, layer(x.contiguous(), domain=torch.arange(6) % 2))


def test_a_bank_with_too_few_examples_moves_no_other():
    layer = bn.BankedBatchNorm(3, banks=("a", "b"))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(5, 3), domain=torch.tensor([0, 0, 0, 0, 1]))
    assert layer["a"].num_batches_tracked == layer["b"].num_batches_tracked == 0


def test_banks_are_not_made_of_other_layers():
    with pytest.raises(TypeError, match="load_state_dict"):
        bn.BankedBatchNorm.from_layer(torch.nn.BatchNorm1d(3), ("a", "b"))
