"""What the checks look at: the model, what it stands beside, and what data showed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnose.check.finding import spelled
from batchnorm.diagnose.check.gap import Gap, gaps
from batchnorm.diagnose.check.neighbours import Neighbours
from batchnorm.diagnose.check.outputs import Outputs
from batchnorm.diagnose.check.seen import SeenByLayer
from batchnorm.diagnose.check.spread import Spread
from batchnorm.layers import BatchNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

#: How a layer of this package is frozen.
RUNNING = ("running", "never")
#: More labels than that are taken as so many kinds, by their remainder.
_KINDS = 64


@dataclass
class Known:
    """What is known of a model.

    Attributes:
        model: The model.
        layers: The batch norms to look at, by name.
        optimizer: What trains it, if given.
        copies: Models whose weights were made from its weights, by name.
        process_group: The processes to compare with, if given.
        batches: The number of batches that were seen.
        seen: What each layer got in evaluation, in the order of the calls.
        of_copies: The same of each copy.
        outputs: The model's outputs in evaluation beside those by the batches' moments.
        labels: How the labels are spread over the batches.
        neighbours: What stands before the layers.
    """

    model: nn.Module
    layers: dict[str, _BatchNorm]
    optimizer: Optimizer | None = None
    copies: Mapping[str, nn.Module] = field(default_factory=dict)
    process_group: ProcessGroup | Literal["world"] | None = None
    batches: int = 0
    seen: dict[str, SeenByLayer] = field(default_factory=dict)
    of_copies: dict[str, dict[str, SeenByLayer]] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=Outputs)
    labels: Spread = field(default_factory=Spread)
    neighbours: Neighbours = field(default_factory=Neighbours)

    @cached_property
    def gaps(self) -> dict[str, Gap]:
        """Return how far each layer is from what it gets, in the order of the calls."""
        return gaps(self.layers, self.seen)

    def add(self, evaluation: Any, by_batch: Any, labels: Tensor | None) -> None:
        """Note what the model returned for a batch, twice, as `Outputs.add` takes it."""
        if labels is not None:
            self.labels.add(kinds(labels))
        self.outputs.add(evaluation, by_batch, labels)
        self.batches += 1

    def spelled(self, name: str) -> str:
        """Return a layer as one writes it in Python."""
        return spelled(self.model, name)

    def recalibrated(self, name: str) -> str:
        """Return the code that takes a layer's statistics anew, be they frozen or not."""
        layer, fix = self.layers[name], "bn.calibrate(model, data)"
        if isinstance(layer, BatchNorm) and (layer.statistics, layer.update) == RUNNING:
            update = f"{self.spelled(name)}.update"
            return f'{update} = "training"; {fix}; {update} = "never"'
        return fix

    def is_ours(self, name: str) -> bool:
        """Return whether a layer is one of this package."""
        return isinstance(self.layers[name], BatchNorm)

    def is_frozen(self, name: str) -> bool:
        """Return whether the running statistics normalize in training, too."""
        return is_frozen(self.model, self.layers[name])


def kinds(labels: Tensor) -> Tensor:
    """Return labels as values whose spread tells whether they are sorted: one for each kind."""
    return F.one_hot(labels.long() % _KINDS, _KINDS).cpu()


def is_frozen(model: nn.Module, layer: _BatchNorm) -> bool:
    """Return whether a layer normalizes by running statistics while its model is trained."""
    if layer.running_mean is None:
        return False
    if isinstance(layer, BatchNorm) and layer.statistics != "mode":
        return layer.statistics == "running"
    return model.training and not layer.training
