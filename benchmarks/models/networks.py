"""The networks: published architectures of Transformers, as they are, with random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import batchnorm as bn

FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


@dataclass(frozen=True)
class Network:
    """A published architecture.

    Attributes:
        name: What it is called on the command line.
        title: What its paper calls it.
        family: How the names of its classes in Transformers begin.
        settings: What its configuration there is given, for the published size. Nothing is
            dropped at random, so that runs can be compared.
        small: The same for the size of a quick bench.
        batch: The number of images in a batch.
        image: How high and wide they are.
    """

    name: str
    title: str
    family: str
    settings: dict[str, Any] = field(repr=False)
    small: dict[str, Any] = field(repr=False)
    batch: int = 16
    image: int = 224

    def quick(self) -> Network:
        """Return the network in the size of a quick bench."""
        title = f"{self.title}, small"
        return replace(self, title=title, settings=self.small, batch=8, image=64)

    def with_images(self, batch: int, image: int) -> Network:
        """Return the network for so many images of another size."""
        settings = dict(self.settings)
        if "image_size" in settings:
            settings["image_size"] = image
        return replace(self, settings=settings, batch=batch, image=image)

    def make(self) -> nn.Module:
        """Return the network in training mode, with random weights, the same ones each time."""
        import transformers

        config = getattr(transformers, f"{self.family}Config")(**self.settings)
        config.problem_type = "single_label_classification"  # or else the first loss sets it
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = getattr(transformers, f"{self.family}ForImageClassification")(config)
        assert isinstance(made, nn.Module)
        return made.train()


_NETWORKS = (
    Network(
        "resnet50", "ResNet-50", "ResNet", {"num_labels": 1000},
        {"num_labels": 10, "depths": [1, 2], "hidden_sizes": [16, 32], "embedding_size": 8},
    ),
    Network(
        "regnet", "RegNetY-400MF", "RegNet",
        {"num_labels": 1000, "depths": [1, 3, 6, 6], "hidden_sizes": [48, 104, 208, 440],
         "groups_width": 8},
        {"num_labels": 10, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 24],
         "embedding_size": 8, "groups_width": 4},
    ),
    Network(
        "mobilenet", "MobileNetV2", "MobileNetV2",
        {"num_labels": 1001, "classifier_dropout_prob": 0.0},
        {"num_labels": 10, "classifier_dropout_prob": 0.0, "depth_multiplier": 0.25,
         "image_size": 64},
    ),
    Network(
        "levit", "LeViT-128", "Levit", {"num_labels": 1000, "image_size": 224},
        {"num_labels": 10, "image_size": 64, "hidden_sizes": [16, 24, 32],
         "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
    ),
)  # fmt: skip
#: By their names on the command line; the figures are about the first.
NETWORKS = {network.name: network for network in _NETWORKS}


class Posed(NamedTuple):
    """A network with its numbers.

    Attributes:
        network: The network.
        layout: The order of the dimensions of its images in memory, a key of `FORMATS`.
        training: The model at the start of training.
        inference: The model in evaluation, with the statistics of the images.
        images: A batch.
        labels: The classes of its images.
    """

    network: Network
    layout: str
    training: nn.Module
    inference: nn.Module
    images: Tensor
    labels: Tensor

    def laid_out(self, layout: str) -> Posed:
        """Return copies with another order of dimensions."""
        form: Any = {"memory_format": FORMATS[layout]}
        return self._replace(
            layout=layout,
            training=copy.deepcopy(self.training).to(**form),
            inference=copy.deepcopy(self.inference).to(**form),
            images=self.images.contiguous(**form),
        )

    def reordered(self) -> Posed:
        """Return the same with the images in another order: the same problem but for rounding."""
        images = self.images.flip(0).contiguous(memory_format=FORMATS[self.layout])
        return self._replace(images=images, labels=self.labels.flip(0))


def pose(network: Network, layout: str = "NCHW") -> Posed:
    """Draw the weights, the images and the labels of a network, the same ones each time.

    Args:
        network: The network.
        layout: The order of dimensions.
    """
    training = network.make()
    generator = torch.Generator().manual_seed(0)
    size = (network.batch, 3, network.image, network.image)
    images = torch.randn(size, generator=generator)
    labels = torch.randint(network.settings["num_labels"], size[:1], generator=generator)
    inference = copy.deepcopy(training)
    bn.calibrate(inference, images, progress=False)
    return Posed(network, "NCHW", training, inference.eval(), images, labels).laid_out(layout)
