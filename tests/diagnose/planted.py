"""Networks in which faults are planted: small, trained for a while, and healthy as they are."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

CLASSES, FEATURES = 4, 16
BOTH = ("1", "4")  # the batch norms of `dense`


def examples(count=1024, seed=1):
    """Return examples of some classes, in no order, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return centres[labels] + torch.randn(count, FEATURES, generator=generator), labels


def loader(size=32, shuffle=False, **options):
    """Return the examples in batches."""
    return DataLoader(TensorDataset(*examples(**options)), size, shuffle=shuffle)


def dense(norm=nn.BatchNorm1d, **options):
    """Return a network with batch norms at 1 and 4."""
    return nn.Sequential(
        nn.Linear(FEATURES, 24, bias=False), norm(24, **options), nn.ReLU(),
        nn.Linear(24, 24, bias=False), norm(24, **options), nn.ReLU(),
        nn.Linear(24, CLASSES),
    )  # fmt: skip


def train(model, data, epochs=2, lr=0.05, logits=lambda output: output):
    """Train a model by steps that become smaller, and return it in evaluation."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, epochs * len(data))
    model.train()
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(logits(model(x)), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@functools.cache
def _trained():
    torch.manual_seed(0)
    return train(dense(), loader())


def healthy():
    """Return a copy of a trained network."""
    return copy.deepcopy(_trained())


def found(report):
    """Return code and layer of all findings, without gaps that another one explains."""
    return [
        (finding.code, finding.layer)
        for finding in report.findings
        if finding.code != "eval_train_gap" or "see there" not in finding.cause
    ]


def setting(layers, **values):
    """Return what sets attributes of layers of a model."""

    def plant(model):
        for name in layers:
            for attribute, value in values.items():
                setattr(model[int(name)], attribute, value)

    return plant
