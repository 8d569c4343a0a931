"""Networks whose data are drawn from a distribution that is known, and can be moved."""

import torch
from torch import nn


def draw(count, shift=0.0, scale=1.0, seed=None):
    """Return pictures of a mixture of ten kinds, brighter by a shift."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(10, 3, 1, 1, generator=generator)
    if seed is not None:
        generator.manual_seed(seed)
    else:
        generator.seed()
    which = torch.randint(10, (count,), generator=generator)
    noise = torch.randn(count, 3, 6, 6, generator=generator)
    return kinds[which] + scale * noise + shift


def trained(norm=nn.BatchNorm2d, batches=100, seed=0):
    """Return a network in evaluation whose running statistics follow the data above."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 12, 3), norm(12), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    with torch.no_grad():
        for batch in range(batches):
            model(draw(32, seed=1000 + batch))
    return model.eval()


def state_of(model):
    """Return copies of all that a model has."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    """Return whether a model has that still, bit for bit, and no hooks."""
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    after = model.state_dict()
    return not any(hooks) and all(torch.equal(after[name], before[name]) for name in before)
