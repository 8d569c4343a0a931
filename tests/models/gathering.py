"""Tools over processes, without any: one process after the other says what it would give."""

import copy
import importlib

import torch


class Recording:
    """A process that is alone, and writes down what it would have given."""

    def __init__(self):
        self.rows = []

    def gather(self, row):
        """Return what is given."""
        self.rows.append(row)
        return row[None]


class Gathering:
    """One process among others, of which it is known what they give."""

    def __init__(self, others):
        self.others = [iter(recording.rows) for recording in others]

    def gather(self, row):
        """Return what all give."""
        return torch.stack([row, *(next(rows) for rows in self.others)])


def over_processes(monkeypatch, function, models, **options):
    """Return what a function does to the first model, as if each were that of a process."""
    module = importlib.import_module("batchnorm.models.statistics")
    monkeypatch.setattr(module, "synchronized", lambda group: group)
    recordings = [Recording() for _ in models[1:]]
    for model, recording in zip(models[1:], recordings, strict=True):
        function(copy.deepcopy(model), recording, **options)
    return function(models[0], Gathering(recordings), **options)
