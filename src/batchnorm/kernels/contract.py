"""What a backend does: the four steps of batch normalization.

    collect(x, mask, form)           -> Moments                 [merge over groups or processes]
    normalize(given)                 -> y                       scale, shift, + residual, activation
    reduce_grad(dy, given)           -> sum g, sum g * xhat     [merge]
    apply_grad(dy, given, through)   -> dx, dresidual

where g = dy * activation'(z), and z, the input of the activation, is computed anew from x. A merge
may stand between the steps, so that whatever changes the moments composes with every backend (see
`kernels.steps`). Where none does, two calls do all of it, and may read memory less often:

    forward(x, ...)                  -> y, moments          collect and normalize
    backward(dy, given, count, ...)  -> the gradients       reduce_grad and apply_grad

Where the form has a `ghost_size`, each group of consecutive examples is normalized on its own (see
`Groups` in `batchnorm.positions`): moments, mean, inverse_std and the two sums are then those of G
groups, (G, C), counts are (G, 1); only the gradients that `backward` returns are summed over them.

What returns y takes `out`, a tensor to return it in, as if by `out.copy_(y)`: it may be x itself,
and overlap whatever else is given. A backend that overwrites x step by step must see to that.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from batchnorm.kernels.activations import Activation
from batchnorm.moments import Moments
from batchnorm.positions import Groups


class Form(NamedTuple):
    """What does not change from call to call of a layer."""

    channel_dim: int = 1
    eps: float = 1e-5
    correction: float = 0
    activation: Activation | None = None
    ghost_size: int | None = None

    def groups(self, shape: tuple[int, ...]) -> Groups | None:
        """Return the groups that a batch of that shape is cut into, or None if it is not."""
        return Groups.of(shape, self.channel_dim, self.ghost_size)


class Given(NamedTuple):
    """What `normalize` and the two steps of the backward pass work on.

    Attributes:
        x: The batch, with C channels along `form.channel_dim`. What is computed from it in its
            shape, y, dy, dx and dresidual, is in its shape and of its type.
        mean: What to subtract, (C,), in the precision of the statistics.
        inverse_std: What to multiply by, (C,), likewise.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        residual: What is added before the activation, in the shape of `x`, or None.
        mask: The weight of each position in the moments: of the rank of `x`, with size 1 along the
            channels, or None where all count the same. What has weight 0 and is not finite is
            read as 0.
        form: What does not change from call to call.
    """

    x: Tensor
    mean: Tensor
    inverse_std: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    form: Form


class Found(NamedTuple):
    """What `forward` returns.

    Attributes:
        y: The normalized batch.
        moments: The batch's, where those normalized it.
        mean: What was subtracted, (C,), in the precision of the statistics, safe to keep.
        inverse_std: What it was multiplied by, (C,), likewise.
    """

    y: Tensor
    moments: Moments | None
    mean: Tensor
    inverse_std: Tensor


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool = True
    weight: bool = True
    bias: bool = True
    residual: bool = True


class Gradients(NamedTuple):
    """The gradients that were wanted, and maybe others; those of the channels are (C,)."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


class Steps(Protocol):
    """One way to compute the four steps."""

    def collect(self, x: Tensor, mask: Tensor | None, form: Form) -> Moments:
        """Return the moments of every channel."""

    def normalize(self, given: Given, out: Tensor | None = None) -> Tensor:
        """Return y = activation(weight * (x - mean) * inverse_std + bias + residual)."""

    def reduce_grad(self, dy: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Return sum g and sum g * xhat, each (C,): the gradients of bias and weight."""

    def apply_grad(
        self, dy: Tensor, given: Given, through: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return dx and dresidual.

        `through` is what flows back through the moments, (sum g) / m and
        (sum g * xhat) / (m - correction), or None where the moments do not depend on x:

            dx = weight * inverse_std * (g - mask * (through[0] + xhat * through[1]))
        """


class Backend(Steps, Protocol):
    """One way to compute the four steps, and the two calls made of them."""

    @property
    def name(self) -> str:
        """What it is called in messages, in `BATCHNORM_BACKEND` and in `bn.backend(...)`."""

    def available(self) -> str | None:
        """Return why this machine or installation cannot run it, or None if it can."""

    def supports(self, x: Tensor, form: Form) -> str | None:
        """Return why it cannot take this batch, or None if it can."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        form: Form,
        running: tuple[Tensor, Tensor] | None,
        out: Tensor | None = None,
    ) -> Found:
        """Normalize by the running mean and variance, or, if that is None, by the batch's own."""

    def backward(
        self, dy: Tensor, given: Given, count: Tensor | float | None, needs: Needs
    ) -> Gradients:
        """Return the gradients; `count` is that of the moments, None if they do not depend on x."""
