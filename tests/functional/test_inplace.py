"""`inplace=True`: the values of a new tensor, written over the input."""

import copy

import pytest
import torch
from support import BACKENDS, FLOATS, LAYOUTS, make

import batchnorm as bn
from batchnorm.kernels import native


def both(x, *args, residual=None, **options):
    """Return what a call gives in new memory, and what it gives in place; `x` is overwritten."""
    apart = x.clone(), *(v.clone() if isinstance(v, torch.Tensor) else v for v in args)
    residual_apart = None if residual is None else residual.clone()
    expected = bn.batch_norm(*apart, residual=residual_apart, **options)
    address, version = x.data_ptr(), x._version
    y = bn.batch_norm(x, *args, residual=residual, **options, inplace=True)
    assert y is x
    assert x.data_ptr() == address
    assert x._version > version
    return expected, y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("training", [True, False])
def test_gives_the_same_in_the_memory_of_the_input(backend, layout, dtype, training):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    x, weight, bias, residual, _ = make(shape, channel_dim, memory_format, dtype)
    mask = torch.randint(0, 3, [n for d, n in enumerate(shape) if d != channel_dim % len(shape)])
    options = {"mask": mask, "activation": "relu", "channel_dim": channel_dim}
    with bn.backend(backend):
        expected, y = both(
            x, torch.zeros(5), torch.ones(5), weight, bias, training, residual=residual, **options
        )
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "residual_of",
    [
        lambda memory, x: x,
        lambda memory, x: x.view(x.shape),
        lambda memory, x: memory[:8],
        lambda memory, x: memory[2:],
        lambda memory, x: x.transpose(2, 3),
        lambda memory, x: x[:1].expand(8, 4, 6, 6),
    ],
    ids=["itself", "its view", "before", "behind", "transposed", "expanded"],
)
def test_a_residual_that_is_the_input_or_overlaps_it(backend, training, residual_of):
    memory = torch.randn(10, 4, 6, 6)
    x = memory[1:9]
    with bn.backend(backend):
        expected, y = both(
            x, torch.zeros(4), torch.ones(4), None, None, training,
            residual=residual_of(memory, x), activation="silu",
        )  # fmt: skip
    assert torch.equal(y, expected)


def test_a_residual_of_another_type_is_left_to_plain_operations():
    x = torch.randn(8, 4, 6, 6)
    options = {"residual": x.double(), "activation": "silu"}
    expected, y = both(x, torch.zeros(4), torch.ones(4), None, None, True, **options)
    assert torch.equal(y, expected)
    if native._native is not None:
        wanted = "the residual is of torch.float64 and the input of torch.float32"
        with bn.backend("native"), pytest.raises(RuntimeError, match=wanted):
            bn.batch_norm(x, training=True, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_the_channels_and_a_mask_that_lie_in_the_input(backend):
    x = torch.rand(600, 600)
    numbers = [x.view(-1)[start : start + 600] for start in (1000, 3000, 5000, 7000)]
    mask = x.view(-1)[9100:9700]
    with bn.backend(backend):
        for args in (numbers, [None, None, *numbers[2:], True]):
            mine = x.clone()
            expected = bn.batch_norm(mine, *args, mask=mask)
            y = bn.batch_norm(x, *args, mask=mask, inplace=True)
            assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "lay_out",
    [lambda x: x[:, :, 1:5], lambda x: x[:, :, ::2], lambda x: x.transpose(0, 3), lambda x: x[:0]],
    ids=["slice", "steps", "transposed", "none"],
)
def test_only_what_the_input_shows_is_written(lay_out):
    memory = torch.randn(4, 3, 6, 8)
    before = memory.clone()
    expected, y = both(lay_out(memory), training=True)
    torch.testing.assert_close(y, expected)
    lay_out(before).copy_(y)
    assert torch.equal(memory, before)


@pytest.mark.skipif(native._native is None, reason="not compiled here")
def test_takes_no_memory_of_the_size_of_the_batch(monkeypatch):
    monkeypatch.setattr(native, "output_like", None)  # where large results come from
    x = torch.randn(40, 8, 64, 65)
    with torch.profiler.profile(profile_memory=True) as profile:
        bn.batch_norm(x, torch.zeros(8), torch.ones(8), inplace=True, activation="relu")
        bn.batch_norm(x, training=True, inplace=True, residual=x)
    assert max(event.self_cpu_memory_usage for event in profile.events()) < x.numel()


def test_running_statistics_follow_what_the_input_was():
    x = torch.randn(50, 3) * 2 + 1
    mean, var = x.mean(0), x.var(0)
    running = torch.zeros(3), torch.ones(3)
    bn.batch_norm(x, *running, training=True, momentum=1.0, inplace=True)
    torch.testing.assert_close(running, (mean, var))


@pytest.mark.parametrize("choice", ["running", "skip"])
def test_one_value_per_channel(choice):
    bias = torch.randn(3)
    expected, y = both(
        torch.randn(1, 3), torch.zeros(3), torch.ones(3), None, bias, True, on_small_batch=choice
    )
    assert torch.equal(y, expected)


class TestRefusal:
    @pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
    def test_where_a_gradient_is_recorded(self, name):
        values = {"weight": torch.ones(3), "bias": torch.ones(3), "residual": torch.randn(4, 3)}
        values = {"input": torch.randn(4, 3), **values}
        values[name].requires_grad_()
        before = values["input"].detach().clone()
        message = r"the backward pass reads it, .* call it under torch.no_grad\(\)"
        with pytest.raises(RuntimeError, match=message):
            bn.batch_norm(**values, training=True, inplace=True)
        assert torch.equal(values["input"], before)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                x = values["input"]
                assert bn.batch_norm(**values, training=True, inplace=True) is x

    @pytest.mark.parametrize("training", [True, False])
    def test_where_values_share_memory(self, training):
        running, expected = (torch.zeros(3), torch.ones(3)), (torch.zeros(3), torch.ones(3))
        x = torch.randn(3).expand(4, 3)
        with pytest.raises(RuntimeError, match=r"several .* strides \(0, 1\).* Clone it first"):
            bn.batch_norm(x, *running, training=training, inplace=True)
        assert all(map(torch.equal, running, expected))
        with pytest.raises(RuntimeError, match=r"lone\(\)"):
            x.relu_()

    def test_of_a_tensor_of_inference_mode_outside_of_it(self):
        with torch.inference_mode():
            x = torch.randn(4, 3)
            assert bn.batch_norm(x, training=True, inplace=True) is x
        with pytest.raises(RuntimeError, match="outside of it: clone it first"):
            bn.batch_norm(x, training=True, inplace=True)

    def test_by_autograd_of_what_it_had_saved(self):
        x = torch.randn(4, 3, requires_grad=True)
        saved = x.sigmoid()
        with torch.no_grad():
            bn.batch_norm(saved, training=True, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()


class TestTracing:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("training", [True, False])
    def test_compiled_code_overwrites_its_input_too(self, backend, training):
        torch._dynamo.reset()
        layer = bn.BatchNorm1d(3, activation="relu", inplace=True).train(training)
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend)
        with torch.no_grad():
            x = torch.randn(8, 3)
            expected = layer(x.clone())
            assert compiled(x) is x
            torch.testing.assert_close(x, expected)
        with pytest.raises(Exception, match="inplace=True overwrites the input"):
            compiled(x)

    @pytest.mark.parametrize("training", [True, False])
    def test_so_does_an_exported_graph(self, training):
        layer = bn.BatchNorm1d(3, inplace=True).train(training)
        x = torch.randn(8, 3)
        with torch.no_grad():
            program = torch.export.export(copy.deepcopy(layer), (torch.randn(8, 3),))
            expected = layer(x.clone())
            torch.testing.assert_close(program.module()(x), expected)
        torch.testing.assert_close(x, expected)

    def test_under_transforms(self):
        x, v = torch.randn(7, 5, 3), torch.randn(7, 5, 3)

        def function(x, inplace=False):
            return bn.batch_norm(x, training=True, inplace=inplace)

        expected = torch.func.vmap(function)(x)
        tangent = torch.func.jvp(function, (x[0],), (v[0],))[1]
        found = torch.func.jvp(lambda x: function(x.clone(), True), (x[0],), (v[0],))[1]
        torch.testing.assert_close(found, tangent)
        torch.func.vmap(lambda x: function(x, True))(x)
        torch.testing.assert_close(x, expected)
