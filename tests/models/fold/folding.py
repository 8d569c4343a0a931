"""What the tests of folding share: trained numbers, and the proof that nothing changed."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.models.compare import largest_error

IMAGES, ROWS = torch.randn(2, 4, 8, 8), torch.randn(5, 4)


def trained(model):
    """Return a model in evaluation and float64 whose batch norms are not the identity."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.2, 3)
                if module.weight is not None:
                    module.weight.normal_()
                if module.bias is not None:
                    module.bias.normal_()
    return model.eval().double()


def sequential(*parts):
    """Return these parts, trained, one after the other."""
    return trained(nn.Sequential(*parts))


def fold(model, *example, **options):
    """Return the folded model and the report, of a model that computes what it did and is the same.

    Beside the example it is called with another one.
    """
    example = tuple(x.double() if x.is_floating_point() else x for x in example)
    before = copy.deepcopy(model.state_dict())
    folded, report = bn.fold(model, example, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.max_error is None or report.max_error <= 1e-12
    others = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in example)
    with torch.no_grad():
        assert largest_error(model(*others), folded(*others)) <= 1e-12
    assert not folded.training
    return folded, report


class Model(nn.Module):
    """A model of some parts, whose forward is a function of it and the inputs."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs, **keywords):
        return self.function(self, *inputs, **keywords)
