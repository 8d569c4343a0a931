"""Published architectures, trained for a while: none of them is ill, but for what is known."""

import pytest
import torch
from architectures import make_architecture
from diagnose.planted import train
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.diagnose.check import check

#: What these have by default is Keras's momentum, and that is what their layers do with it.
MIXED_UP = {"efficientnet": 0.99, "mobilenet_v1": 0.9997, "mobilenet_v2": 0.997}

#: What is true of some of them, and does no harm: small weights, few examples, a bias too many.
NOTES = {"bias_before_norm", "constant_channels", "eps_over_variance"}


@pytest.fixture(scope="module")
def digits():
    """Handwritten digits, 0 and 1, as images of 64 by 64, shuffled."""
    data = pytest.importorskip("sklearn.datasets").load_digits(n_class=2)
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = x.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:192]
    return DataLoader(TensorDataset(images[order], torch.tensor(data.target)[order]), 16)


@pytest.mark.parametrize(
    "name",
    [
        "resnet", "regnet", "mobilenet_v1", "mobilenet_v2", "efficientnet", "mobilevit", "levit",
        "swiftformer",
    ],
)  # fmt: skip
def test_a_published_architecture_is_healthy(name, digits):
    torch.manual_seed(0)
    model, _ = make_architecture(name)
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = {layer.momentum for layer in layers}
    codes = {finding.code for finding in check(model).findings}
    assert ("momentum_convention" in codes) == (name in MIXED_UP)
    assert MIXED_UP.get(name, 0.1) in momenta
    for layer in layers:
        layer.reset_running_stats()
        layer.reset_parameters()
        layer.momentum = 0.3  # of variances of 1e-3, so few steps by 0.1 would leave the start
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = min(module.p, 0.1)  # by default 0.8 and more, of which little is learned
    train(model, digits, epochs=3, lr=0.02, logits=lambda output: output.logits)
    report = check(model, digits)
    assert report.ok, report
    assert {finding.code for finding in report.findings} <= NOTES, report
    assert report.accuracy["evaluation"] > 0.9
    assert max(report.gaps.values()) < 0.4


def test_statistics_that_did_not_forget_their_start_are_found_where_variances_are_small(digits):
    torch.manual_seed(0)
    model, _ = make_architecture("swiftformer")
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.reset_parameters()
    train(model, digits, epochs=3, lr=0.02, logits=lambda output: output.logits)
    report = check(model, digits)
    [gap] = [finding for finding in report.findings if finding.code == "eval_train_gap"]
    assert gap.cause.startswith("not_converged of")
    exec(gap.fix, {"bn": bn, "model": model, "data": digits})
    assert check(model, digits).ok


@pytest.mark.parametrize(
    ("name", "layer", "weight"),
    [
        (
            "resnet",
            "resnet.encoder.stages.1.layers.0.layer.1.normalization",
            "resnet.encoder.stages.1.layers.0.layer.1.convolution",
        ),
        (
            "levit",
            "levit.encoder.stages.0.layers.2.projection.batch_norm",
            "levit.encoder.stages.0.layers.2.projection.linear",
        ),
    ],
)
def test_the_layer_is_named_at_which_a_gap_opens(name, layer, weight, digits):
    torch.manual_seed(0)
    model, _ = make_architecture(name)
    bn.calibrate(model, digits, max_batches=4)
    with torch.no_grad():
        model.get_submodule(weight).weight.mul_(3)
    report = check(model, digits, max_batches=4)
    [gap] = [finding for finding in report.findings if finding.code == "eval_train_gap"]
    assert gap.layer == layer
    assert report.gaps[layer] > 0.5
    before = list(report.gaps)[: list(report.gaps).index(layer)]
    assert max(report.gaps[name] for name in before) < 0.3
