"""Batch norms as other packages have them, and modules that only look like these."""

import torch
from torch import nn
from torch.nn import functional as F


class Frozen(nn.Module):
    """Of detection packages: buffers alone, and an eps as an attribute."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        shape = (1, -1, 1, 1)
        scale = self.weight.reshape(shape) / (self.running_var.reshape(shape) + self.eps).sqrt()
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


class FrozenWithAct(Frozen):
    """The same, and an activation."""

    def __init__(self, channels, act=nn.ReLU):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act()

    def forward(self, x):
        moments = self.running_mean, self.running_var
        x = F.batch_norm(x, *moments, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(x))


class NormAct2d(nn.BatchNorm2d):
    """A subclass with an activation, as timm has it."""

    def __init__(self, channels, act=nn.ReLU, drop=nn.Identity, **settings):
        super().__init__(channels, **settings)
        self.drop, self.act = drop(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FixedEps(Frozen):
    """An eps that stands in the code."""

    def __init__(self, channels):
        super().__init__(channels, 1e-3)
        self.hidden = (self.__dict__.pop("eps"),)

    def __getattr__(self, name):
        return self.hidden[0] if name == "eps" else super().__getattr__(name)


class OddEps(Frozen):
    """One that nobody would guess."""

    def forward(self, x):
        self.eps = 3e-4
        y = super().forward(x)
        self.eps = 1e-5
        return y


class NoAffine(Frozen):
    """Running statistics alone, of vectors."""

    def __init__(self, channels):
        super().__init__(channels)
        del self.weight, self.bias

    def forward(self, x):
        return (x - self.running_mean) * (self.running_var + self.eps).rsqrt()


class AbsoluteWeight(Frozen):
    """What normalizes in place takes the weight's absolute value."""

    def forward(self, x):
        signed, self.weight = self.weight, self.weight.abs() + self.eps
        y = super().forward(x)
        self.weight = signed
        return y


class Learning(nn.Module):
    """A batch norm of which torch knows nothing, that moves its statistics in training."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        moments = self.running_mean, self.running_var
        return F.batch_norm(x, *moments, self.weight, self.bias, self.training)


class NoGradient(Frozen):
    """The right output, and no gradient through the scale."""

    def forward(self, x):
        y = super().forward(x)
        return x + (y - x).detach()


class Codebook(Frozen):
    """Something else that keeps a mean and a variance."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("codes", torch.zeros(channels))


class Joint(nn.Module):
    """Running statistics that are no vectors."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels, channels))
        self.register_buffer("running_var", torch.ones(channels, channels))


class Failing(Frozen):
    """It cannot be copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("there is one of me")


class UnbiasedAct2d(NormAct2d):
    """In training its variance is another one; in evaluation it is a batch norm."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y = (x - x.mean((0, 2, 3), keepdim=True)) / (
            x.var((0, 2, 3), keepdim=True) + self.eps
        ).sqrt()
        shape = (1, -1, 1, 1)
        return self.act(y * self.weight.view(shape) + self.bias.view(shape))


class ForgetfulAct2d(NormAct2d):
    """It normalizes as one should, and forgets the statistics."""

    def forward(self, x):
        if self.training:
            return self.act(F.batch_norm(x, None, None, self.weight, self.bias, True, 0, self.eps))
        return super().forward(x)
