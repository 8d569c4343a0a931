"""What a network's batch norms get: seen by a function while the network runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.models.batches import Modes, uncompiled


class Seen(NamedTuple):
    """What a batch norm got in a call.

    Attributes:
        x: The batch, in its own type.
        channel_dim: The dimension of its channels.
        mask: Which positions are there, or their weights; all if None.
    """

    x: Tensor
    channel_dim: int
    mask: Tensor | None

    def rows(
        self,
        most: int | None = None,
        generator: torch.Generator | None = None,
        *,
        examples: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the values as (examples, channels, positions), and the weights beside them.

        The examples are along the first dimension that is not the channels'. The weights have shape
        (examples, 1, positions), and are None if all count alike.

        Args:
            most: How many positions, each example its own, for a place of a picture is not like
                another; all if left out.
            generator: What they are drawn by, on the CPU.
            examples: How many examples the batch has, where that is known: tokens that were
                flattened into rows are no examples, but those of one stand together.
        """
        channel = self.channel_dim % self.x.ndim
        example = 1 if channel == 0 else 0
        rest = [dim for dim in range(self.x.ndim) if dim not in (example, channel)]
        order = [example, channel, *rest]
        values = self.x.permute(order)
        values = values.flatten(2) if rest else values[:, :, None]
        places = None
        if self.mask is not None:
            positions = [size for dim, size in enumerate(self.x.shape) if dim != channel]
            places = torch.broadcast_to(self.mask, positions).unsqueeze(channel).permute(order)
            places = places.flatten(2) if rest else places[:, :, None]
            places = places.to(torch.float32)
        values = _of_examples(values, examples)
        places = None if places is None else _of_examples(places, examples)
        count, _, length = values.shape
        if most is not None and length > most:
            drawn = torch.randint(length, (count, most), generator=generator).to(values.device)
            rows = torch.arange(count, device=values.device)[:, None]
            values = values[rows, :, drawn].mT
            places = None if places is None else places[rows, :, drawn].mT
        return values, places


def _of_examples(values: Tensor, examples: int | None) -> Tensor:
    """Return (examples, channels, positions) of what has several rows for an example."""
    if not examples or len(values) == examples or len(values) % examples:
        return values
    rows = values.reshape(examples, -1, *values.shape[1:])
    return rows.transpose(1, 2).flatten(2)


@contextmanager
def observed(layers: Mapping[str, _BatchNorm], see: Callable[[str, Seen], None]) -> Iterator[None]:
    """Let a function see what each layer gets, inside: before the layer works, without gradients.

    Args:
        layers: The layers, by name.
        see: Takes the name of a layer and what it got.
    """

    def watch(name: str) -> Callable[..., None]:
        def before(layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = args[0] if args else keywords["input"]
            mask = args[2] if len(args) > 2 else keywords.get("mask")
            dim = getattr(layer, "channel_dim", 1)
            if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[dim] != layer.num_features:
                return  # the layer says what is wrong
            with torch.no_grad():
                see(name, Seen(x.detach(), dim, mask))

        return before

    handles = [
        layer.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation, inside, without gradients; what was compiled runs as written."""
    modes = Modes(model)
    try:
        with torch.no_grad(), uncompiled():
            model.eval()
            yield
    finally:
        modes.restore()
