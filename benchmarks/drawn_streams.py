"""Streams of digits, clean and shifted, heard by a `ShiftDetector`; a process does some."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.study.data import load
from batchnorm.study.descent import batches, one_thread, some, step
from batchnorm.study.networks import NETWORKS, build
from batchnorm.study.recipes import NORMALIZED
from batchnorm.study.shifts import shift

WINDOW = 32
LENGTH = 100  # windows in a stream


@cache
def trained(name: str) -> nn.Module:
    """Return a network of the study, trained on digits.

    Args:
        name: Its name; with ", after", it is normalized after its activations.
    """
    name, _, place = name.partition(", ")
    network, data = NETWORKS[name], load("digits")
    recipe = replace(NORMALIZED, place="after") if place else NORMALIZED
    model = build(network, recipe, data.shape, data.classes, 0)
    for at, batch in enumerate(batches(data, 60, 0, torch.float32)):
        if at == network.steps:
            break
        step(model, *batch, network.usual_rate)
    return model.eval()


@cache
def held_out(name: str | None, severity: int) -> Tensor:
    """Return the held-out examples, shifted if a shift is named."""
    data = load("digits")
    x, _ = some(data.test_inputs, data.test_labels, torch.float32)
    if name is None:
        return x
    low, high = float(data.train_inputs.min()), float(data.train_inputs.max())
    return torch.from_numpy(shift(x.numpy(), name, severity, low=low, high=high))


def alarms(network: str, name: str | None, severity: int, streams: range) -> list[int]:
    """Return, for each stream, after how many windows there was an alarm; 0 for none.

    Args:
        network: The name of the network.
        name: Of the shift, or None for clean streams.
        severity: Its severity.
        streams: By what each stream is drawn.
    """
    with one_thread():
        model, x = trained(network), held_out(name, severity)
        found = []
        with torch.no_grad(), bn.ShiftDetector(model, window=WINDOW) as detector:
            for stream in streams:
                detector.reset()
                generator = torch.Generator().manual_seed(stream)
                while not detector.alarm and len(detector.looks) < LENGTH:
                    model(x[torch.randint(len(x), (WINDOW,), generator=generator)])
                found.append(len(detector.looks) if detector.alarm else 0)
    return found
