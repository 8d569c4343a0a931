"""Conversion: a model computes what it did, trains on, and is given back as it was."""

import copy
import io
import random
import sys

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, make_architecture
from models import foreign
from models.holding import attributes
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.models.adopt import become

STOCK = {
    nn.BatchNorm1d: (bn.BatchNorm1d, (6, 4)),
    nn.BatchNorm2d: (bn.BatchNorm2d, (6, 4, 3, 3)),
    nn.BatchNorm3d: (bn.BatchNorm3d, (6, 4, 3, 2, 2)),
    nn.SyncBatchNorm: (bn.SyncBatchNorm, (6, 4, 3)),
}
LAZY = {
    nn.LazyBatchNorm1d: STOCK[nn.BatchNorm1d],
    nn.LazyBatchNorm2d: STOCK[nn.BatchNorm2d],
    nn.LazyBatchNorm3d: STOCK[nn.BatchNorm3d],
}


class Mine(nn.BatchNorm2d):
    """A subclass, of which nobody knows what its forward does."""


def fill(layer):
    """Give a layer numbers with which it is not the identity."""
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5 if name.endswith("running_var") else -1, 2)
    return layer


def numbers(output):
    """Return the floating-point tensors that a model returns."""
    values = output.values() if hasattr(output, "values") else [output]
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


def saved(thing):
    """Return what torch.save and torch.load make of something."""
    stream = io.BytesIO()
    torch.save(thing, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


class TestArchitectures:
    """Published models, without an edit to any."""

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_evaluates_as_before_and_is_given_back(self, name):
        model, example = make_architecture(name)
        layers = [m for m in model.modules() if "running_mean" in m._buffers]
        before, keys = [attributes(layer) for layer in layers], list(model.state_dict())
        with torch.no_grad():
            expected = numbers(model(*example))
        report = bn.convert(model)
        assert report.converted
        assert not report.left
        assert list(model.state_dict()) == keys
        with torch.no_grad():
            torch.testing.assert_close(numbers(model(*example)), expected, rtol=1e-4, atol=1e-5)
        assert bn.revert(model).done == report.done
        assert [attributes(layer) for layer in layers] == before

    @pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "fastspeech2_conformer"])
    def test_trains_as_before(self, name):
        """In float64, where what differs by more than rounding shows."""
        ours, example = make_architecture(name)
        ours.double().train()
        theirs, losses = copy.deepcopy(ours), ([], [])
        optimizers = [
            torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9) for m in (ours, theirs)
        ]
        for step in range(4):
            if step == 1:  # in the midst of training, and back for the last step
                bn.convert(ours)
            if step == 3:
                bn.revert(ours)
            for model, optimizer, found in zip((ours, theirs), optimizers, losses, strict=True):
                torch.manual_seed(step)
                random.seed(step)
                np.random.seed(step)  # noqa: NPY002 - which speech models draw their masks from
                batch = [torch.randn(x.shape, dtype=torch.float64) for x in example]
                loss = sum(y.square().mean() for y in numbers(model(*batch)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-7)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-8)


class TestLayersOfTorch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
    @pytest.mark.parametrize("stock", STOCK)
    def test_there_and_back(self, stock, options, dtype):
        ours, shape = STOCK[stock]
        layer, calls = fill(stock(4, momentum=None, eps=1e-3, **options, dtype=dtype)), []
        layer.register_forward_hook(lambda *_: calls.append(1))
        expected = copy.deepcopy(layer)
        before = attributes(layer)
        report = bn.convert(layer)
        assert repr(report) == f"1 converted: itself\n  1 {stock.__name__}"
        assert type(layer) is ours
        x = torch.randn(shape, dtype=dtype)
        tolerance = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {}
        for _ in "two":
            torch.testing.assert_close(layer(x), expected(x), **tolerance)
        torch.testing.assert_close(
            layer.state_dict(), expected.state_dict(), check_dtype=False, **tolerance
        )
        assert len(calls) == 6
        bn.revert(layer)
        if dtype is torch.bfloat16:  # their running statistics were wider meanwhile
            assert type(layer) is stock
            assert [b.dtype for b in layer.buffers()] == [b.dtype for b in expected.buffers()]
            assert layer.__dict__.keys() == before[0][1].keys()
        else:
            assert attributes(layer) == before

    @pytest.mark.parametrize("lazy", LAZY)
    def test_a_lazy_layer_becomes_ours_with_its_first_batch(self, lazy):
        ours, shape = LAZY[lazy]
        model = nn.Sequential(lazy())
        before, keys = attributes(model), list(model.state_dict())
        assert bn.convert(model).classes == {"0": lazy.__name__}
        assert bn.convert(model).left == {"0": "it is one of batchnorm already"}
        assert list(model.state_dict()) == keys
        assert bn.revert(model).done == ["0"]
        assert attributes(model) == before
        bn.convert(model)
        expected = nn.Sequential(lazy())
        for _ in "two":
            x = torch.randn(shape)
            torch.testing.assert_close(model(x), expected(x))
            assert type(model[0]) is ours
        torch.testing.assert_close(model.state_dict(), expected.state_dict())
        bn.revert(model)
        assert type(model[0]) is type(expected[0])
        assert model[0].__dict__.keys() == expected[0].__dict__.keys()

    def test_a_lazy_layer_of_a_half_type(self):
        model = nn.Sequential(nn.LazyBatchNorm1d(dtype=torch.bfloat16))
        bn.convert(model)
        for _ in "two":
            model(torch.randn(6, 4).bfloat16())
        assert model[0].running_var.dtype == torch.float32
        bn.revert(model)
        assert model[0].running_var.dtype == torch.bfloat16

    def test_shared_layers_stay_shared_and_the_rest_is_left_alone(self):
        norm = nn.BatchNorm2d(4)
        model = nn.ModuleList([norm, nn.Conv2d(4, 4, 1), norm, nn.InstanceNorm2d(4)])
        model[3].track_running_stats = True
        assert bn.convert(model).converted == ["0"]
        assert model[0] is model[2] is norm
        assert type(model[3]) is nn.InstanceNorm2d

    def test_where_and_dry_run(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
        before = attributes(model)
        report = bn.convert(model, where=["1", "2"], dry_run=True)
        assert report.done == ["1", "2"]
        assert repr(report) == "2 to be converted: 1, 2\n  1 BatchNorm1d, 1 LazyBatchNorm1d"
        assert attributes(model) == before
        assert bn.convert(model, where=lambda name, layer: name != "0").done == ["1", "2"]
        converted = attributes(model)
        report = bn.revert(model, dry_run=True)
        assert (report.done, list(report.left)) == (["1", "2"], ["0"])
        assert attributes(model) == converted
        bn.revert(model, where="1")
        assert type(model[1]) is nn.BatchNorm1d
        bn.revert(model, where="2")
        assert attributes(model) == before

    def test_it_is_done_once(self):
        model = nn.Sequential(nn.BatchNorm1d(3))
        before = attributes(model)
        bn.convert(model)
        assert bn.convert(model).left == {"0": "it is one of batchnorm already"}
        bn.revert(model)
        assert bn.revert(model).left == {"0": "it is none of batchnorm"}
        assert attributes(model) == before

    def test_an_attribute_that_means_something_else_to_its_owner(self):
        layer = nn.BatchNorm1d(3).eval()
        layer.activation, layer.ranks, layer.update = "prelu", "first", lambda: None
        before, x = attributes(layer), torch.randn(4, 3)
        expected = layer(x)
        bn.convert(layer)
        torch.testing.assert_close(layer(x), expected)
        bn.revert(layer)
        assert attributes(layer) == before

    def test_nothing_is_converted_if_one_fails(self, monkeypatch):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        before, calls = attributes(model), []

        def fails(layer, *args):
            become(layer, *args)
            calls.append(layer)
            if len(calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(sys.modules["batchnorm.models.convert"], "become", fails)
        with pytest.raises(KeyboardInterrupt):
            bn.convert(model)
        assert attributes(model) == before

    def test_layers_without_values_yet(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.BatchNorm2d(3), foreign.Frozen(3), foreign.NormAct2d(3))
        before = attributes(model)
        assert bn.convert(model).done == ["0", "1", "2"]
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        bn.revert(model)
        assert attributes(model) == before


class TestWhatIsLeft:
    def left(self, layer):
        """Return why a layer is left, which it then is."""
        before = attributes(layer)
        report = bn.convert(layer)
        assert not report.done
        assert attributes(layer) == before
        (reason,) = report.left.values()
        return reason

    def test_subclasses(self):
        reason = "it is a Mine, a subclass: what its forward does is not known"
        assert self.left(Mine(3)) == reason

    def test_parametrized_layers(self):
        layer = nn.BatchNorm2d(3)
        parametrize.register_parametrization(layer, "weight", nn.Softplus())
        assert self.left(layer) == "it is parametrized: remove the parametrizations first"

    def test_a_forward_on_the_layer_itself(self):
        layer = nn.BatchNorm2d(3)
        layer.forward = lambda x: x
        assert self.left(layer) == "its forward was replaced, on the layer itself"

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_scripts(self):
        report = bn.convert(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))))
        assert report.left == {"0": "torch.jit compiled it"}

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (foreign.OddEps, "it is a OddEps, and a copy of it did not compute frozen batch norm"),
            (foreign.AbsoluteWeight, "it is a AbsoluteWeight, and a copy of it did not compute"),
            (foreign.Learning, "it is a Learning, and a copy of it did not compute frozen batch"),
            (foreign.NoGradient, "it is a NoGradient, and a copy of it did not compute frozen"),
            (
                foreign.UnbiasedAct2d,
                "it is a UnbiasedAct2d, and a copy of it did not compute batch",
            ),
            (foreign.ForgetfulAct2d, "it is a ForgetfulAct2d, and a copy of it did not compute"),
            (foreign.Codebook, "it is a Codebook, which has more: codes"),
            (foreign.Joint, "it is a Joint, whose statistics are not one number a channel"),
            (
                foreign.Failing,
                "it is a Failing, of which no copy could be run: RuntimeError: there",
            ),
        ],
    )
    def test_what_only_looks_like_one(self, make, reason):
        assert self.left(make(3)).startswith(reason)

    def test_activations_that_we_have_not(self):
        for act in (nn.Mish, nn.PReLU, nn.RReLU):
            reason = f"its activation, {act.__name__}, is none that batchnorm has"
            assert self.left(foreign.NormAct2d(3, act)) == reason

    def test_what_drops_values(self):
        layer = foreign.NormAct2d(3, drop=nn.Dropout2d)
        assert self.left(layer) == "it drops part of its output, by a Dropout2d"

    def test_an_activation_with_hooks(self):
        layer = foreign.NormAct2d(3)
        layer.act.register_forward_hook(lambda *_: None)
        reason = "its activation has hooks, which would not be called any more"
        assert self.left(layer) == reason


def counting(count):
    """Return a frozen layer with a place for the number of batches."""
    layer = foreign.Frozen(5)
    layer.register_buffer("num_batches_tracked", count)
    return layer


ALIKE = {
    "buffers alone": lambda: foreign.Frozen(5, eps=0.1),
    "a count": lambda: counting(torch.tensor(7)),
    "no count": lambda: counting(None),
    "no eps": lambda: foreign.FixedEps(5),
    "an activation": lambda: foreign.FrozenWithAct(5, nn.SiLU),
    "subclass": lambda: foreign.NormAct2d(5),
    "subclass, leaky": lambda: foreign.NormAct2d(5, lambda: nn.LeakyReLU(0.2, inplace=True)),
    "subclass, average": lambda: foreign.NormAct2d(5, nn.Identity, momentum=None),
    "subclass, no affine": lambda: foreign.NormAct2d(5, lambda: nn.ELU(0.7), affine=False),
    "subclass, no statistics": lambda: foreign.NormAct2d(5, nn.GELU, track_running_stats=False),
}


class TestLayersOfOtherPackages:
    @pytest.mark.parametrize("name", ALIKE)
    def test_there_and_back(self, name):
        layer, calls = fill(ALIKE[name]()), []
        layer.register_forward_hook(lambda *_: calls.append(1))
        expected = copy.deepcopy(layer)
        before, random_state = attributes(layer), torch.get_rng_state()
        assert bn.convert(layer).left == {}
        assert not calls  # a copy was run, and not with them
        assert torch.equal(torch.get_rng_state(), random_state)
        assert isinstance(layer, bn.BatchNorm)
        assert layer.state_dict().keys() == expected.state_dict().keys()
        for training in (True, True, False):
            x = torch.randn(6, 5, 3, 3)
            torch.testing.assert_close(layer.train(training)(x), expected.train(training)(x))
        torch.testing.assert_close(layer.state_dict(), expected.state_dict())
        if name != "an activation":  # which takes any rank
            with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
                layer(torch.randn(6, 5))
        bn.revert(layer)
        layer.train()
        assert attributes(layer) == before

    @pytest.mark.parametrize(
        ("act", "activation"),
        [
            (nn.ReLU, "relu"),
            (lambda: nn.LeakyReLU(0.3), ("leaky_relu", 0.3)),
            (nn.LeakyReLU, "leaky_relu"),
            (lambda: nn.ELU(0.7), ("elu", 0.7)),
            (nn.SiLU, "silu"),
            (nn.GELU, "gelu"),
            (nn.Sigmoid, "sigmoid"),
            (nn.Tanh, "tanh"),
            (nn.Identity, None),
        ],
    )
    def test_activations_by_what_they_do(self, act, activation):
        layer = foreign.NormAct2d(3, act)
        bn.convert(layer)
        assert type(layer) is bn.BatchNorm2d
        assert layer.activation == activation

    def test_vectors_without_an_affine_part(self):
        layer, x = foreign.NoAffine(5), torch.randn(4, 5)
        before, expected = attributes(layer), layer(x)
        bn.convert(layer)
        torch.testing.assert_close(layer(x), expected)
        assert "bias=False" in repr(layer)
        bn.revert(layer)
        assert attributes(layer) == before

    @pytest.mark.parametrize("assign", [False, True])
    def test_state_dicts_load_before_and_after_with_and_without_a_count(self, assign):
        """Strictly; theirs have no count of batches and an older version in the metadata."""
        first, second = foreign.Frozen(5), foreign.Frozen(5)
        stock = nn.Sequential(fill(nn.BatchNorm2d(5))).eval()
        bn.convert(second)
        assert first.state_dict()._metadata[""] != second.state_dict()._metadata[""]
        x = torch.randn(2, 5, 3, 3)
        for source, target in ((first, second), (second, first), (stock[0], second)):
            target.load_state_dict(source.state_dict(), strict=True, assign=assign)
            torch.testing.assert_close(target(x), source(x))
        model = nn.Sequential(second)
        model.load_state_dict(stock.state_dict())
        model.load_state_dict(nn.Sequential(first).state_dict())
        plain = dict(stock.state_dict())  # without metadata
        model.load_state_dict(plain)
        plain["0.scale"] = plain.pop("0.weight")
        with pytest.raises(
            RuntimeError, match=r"Missing .*\"0.weight\".*\s*Unexpected .*\"0.scale\""
        ):
            model.load_state_dict(plain)

    def test_half_types(self):
        layer, x = foreign.Frozen(5), torch.randn(2, 5, 3, 3)
        expected = layer(x)
        bn.convert(layer)
        layer.bfloat16()
        torch.testing.assert_close(layer(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)
        assert layer.running_var.dtype == torch.float32
        bn.revert(layer)
        assert {b.dtype for b in layer.buffers()} == {torch.bfloat16}
        bn.convert(layer.float())
        bn.revert(layer)
        assert {b.dtype for b in layer.buffers()} == {torch.float32}

    def test_the_other_tools_take_them(self):
        model, x = nn.Sequential(foreign.Frozen(5), foreign.NormAct2d(5)), torch.randn(4, 5, 3, 3)
        bn.convert(model)
        report = bn.calibrate(model, [x])
        assert (report.done, report.left) == (["1"], {"0": "it is frozen"})
        assert bn.freeze(model).done == ["0", "1"]
        assert bn.unfreeze(model).done == ["0", "1"]
        with bn.transaction(model):
            model(x)
        assert model[1].num_batches_tracked == 2
        assert bn.revert(model).done == ["0", "1"]


class TestRevert:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("stock", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
    def test_what_was_made_as_ours_and_is_no_more_than_theirs(self, stock, dtype):
        ours, shape = STOCK[stock]
        layer, expected = ours(4, eps=1e-3, dtype=dtype), stock(4, eps=1e-3, dtype=dtype)
        bn.revert(layer)
        assert type(layer) is stock
        assert layer.__dict__.keys() == expected.__dict__.keys()
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(layer(x), expected(x))
        torch.testing.assert_close(layer.state_dict(), expected.state_dict(), rtol=0, atol=0)

    def test_a_synchronized_one(self):
        with torch.device("meta"):
            layer, local = bn.SyncBatchNorm(4), bn.SyncBatchNorm(4)
        bn.revert(layer)
        assert type(layer) is nn.SyncBatchNorm
        assert layer.__dict__.keys() == nn.SyncBatchNorm(4).__dict__.keys()
        assert layer.process_group is None
        bn.unsynchronize(local)
        reason = "its process_group is None, which SyncBatchNorm of torch has not"
        assert bn.revert(local).left == {"": reason}

    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (bn.BatchNorm(3), "torch.nn has no BatchNorm"),
            (bn.FrozenBatchNorm(3), "torch.nn has no FrozenBatchNorm"),
            (bn.GhostBatchNorm(3), "torch.nn has no GhostBatchNorm"),
            (bn.BatchRenorm(3), "torch.nn has no BatchRenorm"),
            (bn.SyncBatchNorm(3), "SyncBatchNorm of torch runs on no CPU"),
            (
                bn.BatchNorm2d(3, activation=("elu", 0.7)),
                "its activation is ('elu', 0.7), which BatchNorm2d of torch has not",
            ),
            (
                bn.BatchNorm1d(3, channel_dim=-1),
                "its channel_dim is -1, which BatchNorm1d of torch has not",
            ),
            (
                bn.BatchNorm1d(3, statistics="batch"),
                "its statistics is 'batch', which BatchNorm1d of torch has not: unfreeze it first",
            ),
        ],
    )
    def test_what_is_more_is_left(self, layer, reason):
        before = attributes(layer)
        assert bn.revert(layer).left == {"": reason}
        assert attributes(layer) == before

    def test_a_setting_that_was_changed_since_is_not_lost(self):
        model = nn.Sequential(nn.BatchNorm2d(3), foreign.Frozen(3))
        bn.convert(model)
        model[0].activation, model[1].statistics = "relu", "mode"
        assert bn.revert(model).left == {
            "0": "its activation is 'relu', which BatchNorm2d of torch has not",
            "1": "its statistics is 'mode', which Frozen of models has not: unfreeze it first",
        }
        model[0].activation, model[1].statistics = None, "running"
        assert bn.revert(model).done == ["0", "1"]

    @pytest.mark.parametrize("first", [bn.convert, lambda model: None])
    @pytest.mark.parametrize(
        ("tool", "undo", "reason"),
        [
            (bn.freeze, bn.unfreeze, "it is frozen: unfreeze it first"),
            (bn.synchronize, bn.unsynchronize, "it is synchronized: unsynchronize it first"),
        ],
    )
    def test_what_another_tool_holds_is_left(self, tool, undo, reason, first):
        model = nn.Sequential(nn.BatchNorm2d(3))
        before = attributes(model)
        first(model)
        tool(model)
        bn.convert(model)
        assert bn.revert(model).left == {"0": reason}
        undo(model)
        assert type(model[0]) is bn.BatchNorm2d
        assert bn.revert(model).done == ["0"]
        assert attributes(model) == before

    def test_what_a_tool_holds_that_was_made_as_ours(self):
        model = nn.Sequential(bn.BatchNorm2d(3))
        bn.freeze(model)
        assert bn.revert(model).left["0"].endswith("has not: unfreeze it first")
        bn.unfreeze(model)
        bn.synchronize(model)
        assert bn.revert(model).left["0"].endswith("has not: unsynchronize it first")
        bn.unsynchronize(model)
        assert bn.revert(model).done == ["0"]

    def test_in_a_transaction(self):
        for layer in (nn.BatchNorm1d(3), bn.BatchNorm1d(3)):
            with bn.transaction(layer):
                reason = "it is in a transaction: commit or roll back first"
                bn.convert(layer)
                assert bn.revert(layer).left == {"": reason}
            assert bn.revert(layer).done == [""]

    def test_what_unsynchronize_made_local_stays_so(self):
        layer = nn.SyncBatchNorm(3)
        bn.convert(layer)
        bn.unsynchronize(layer)
        reason = "unsynchronize made it local, which torch.nn.SyncBatchNorm cannot be"
        assert bn.revert(layer).left == {"": reason}

    def test_what_was_parametrized_since(self):
        layer = nn.BatchNorm1d(3)
        bn.convert(layer)
        parametrize.register_parametrization(layer, "weight", nn.Softplus())
        reason = "its class has become ParametrizedBatchNorm1d since: undo that first"
        assert bn.revert(layer).left == {"": reason}
        layer(torch.randn(4, 3))
        parametrize.remove_parametrizations(layer, "weight")
        bn.revert(layer)
        assert type(layer) is nn.BatchNorm1d


class TestAConvertedModel:
    @pytest.fixture
    def model(self):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), foreign.NormAct2d(4), foreign.Frozen(4)
        )
        return fill(model).eval()

    @pytest.mark.parametrize("twin", [copy.deepcopy, saved])
    def test_is_copied_and_saved(self, model, twin):
        x, keys = torch.randn(2, 3, 8, 8), [set(vars(m)) for m in model]
        expected = model(x)
        bn.convert(model)
        new = twin(model)
        assert [type(m) for m in new] == [type(m) for m in model]
        torch.testing.assert_close(new(x), expected)
        bn.revert(new)
        assert [set(vars(m)) for m in new] == keys
        torch.testing.assert_close(new(x), expected)
        assert isinstance(model[1], bn.BatchNorm2d)

    def test_is_compiled_before_and_after(self, model):
        compiled = torch.compile(model, backend="aot_eager")
        x = torch.randn(2, 3, 8, 8)
        expected = compiled(x)
        bn.convert(model)
        torch.testing.assert_close(compiled(x), expected)
        bn.revert(model)
        torch.testing.assert_close(compiled(x), expected)

    def test_is_replicated_as_data_parallel_does(self, model):
        x = torch.randn(2, 4, 8, 8)
        bn.convert(model)
        for layer in model[1:]:
            replica = layer._replicate_for_data_parallel()
            for name, parameter in layer.named_parameters():
                setattr(replica, name, parameter * 1)
            torch.testing.assert_close(replica(x), layer(x))

    def test_goes_to_a_half_type(self, model):
        bn.convert(model)
        model.half()
        assert model(torch.randn(2, 3, 8, 8).half()).dtype == torch.float16
        bn.revert(model)
        assert {t.dtype for t in model.state_dict().values()} == {torch.float16, torch.int64}


def test_the_report_is_plain_data():
    model = nn.Sequential(nn.BatchNorm2d(3), Mine(3), Mine(3))
    reason = "it is a Mine, a subclass: what its forward does is not known"
    report = bn.convert(model)
    assert report.to_dict() == {
        "verb": "converted",
        "done": ["0"],
        "left": {"1": reason, "2": reason},
        "classes": {"0": "BatchNorm2d"},
    }
    assert repr(report).splitlines() == [
        "1 converted: 0",
        "  1 BatchNorm2d",
        f"  left 1, 2 (2): {reason}",
    ]
    many = nn.ModuleDict({f"block{at}": nn.Sequential(Mine(3)) for at in range(40)})
    assert all(len(line) <= 80 for line in repr(bn.convert(many)).splitlines())
