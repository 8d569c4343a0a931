"""Published architectures as they are: the same outputs and losses, and a reason for each layer."""

import copy
import logging

import pytest
import torch
from architectures import ARCHITECTURES, make_architecture
from models.accelerate.agreement import assert_same
from models.holding import buffers_of
from torch.utils import _pytree as pytree

import batchnorm as bn
from batchnorm.models import capture
from batchnorm.models.accelerate.backend import backend
from batchnorm.models.memory import kept_bytes
from batchnorm.models.walk import batch_norms

#: What runs fused, by what, and how many layers run alone, in evaluation.
FUSED = {
    "resnet": ({"relu": 7, "add + relu": 3}, 2),
    "regnet": ({"relu": 9, "add + relu": 4}, 4),
    "mobilenet_v1": ({"relu6": 27}, 0),
    "mobilenet_v2": ({"relu6": 35, "add": 10}, 7),
    "efficientnet": ({"silu": 17, "add": 1}, 7),
    "mobilevit": ({"silu": 25, "add": 3}, 4),
    "levit": ({"hardswish": 3}, 24),
    "segformer": ({"relu": 1}, 0),
    "swiftformer": ({"relu": 2}, 12),
    "detr": ({}, 9),
    "rt_detr": ({"silu": 12, "add + silu": 12}, 36),
    "wav2vec2_conformer": ({"gelu": 2}, 0),
    "fastspeech2_conformer": ({"tanh": 4, "silu": 2}, 1),
}

#: Those whose training is compared.
TRAINED = (
    "resnet",
    "regnet",
    "mobilenet_v1",
    "efficientnet",
    "mobilevit",
    "levit",
    "swiftformer",
    "wav2vec2_conformer",
)

#: Those of which the batch norms alone are in training: one drops 999 values of 1000, and the other
#: draws its masks at other times once it is compiled, whatever the backend.
RANDOM = ("mobilenet_v1", "wav2vec2_conformer")


@pytest.fixture(autouse=True)
def _quiet():
    """Transformers and Dynamo warn of what is not the matter here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluation(name, monkeypatch):
    """The graphs that are captured to explain a model run both ways: capturing takes the time."""
    compared, note = [], capture._note

    def noted(module, inputs):
        fast, stock = backend(copy.deepcopy(module), inputs), note(module, inputs)

        def run(*inputs):
            with torch.no_grad():
                actual = fast(*(v.clone() if torch.is_tensor(v) else v for v in inputs))
            expected = stock(*inputs)
            assert_same(_tensors(actual), _tensors(expected), 1e-5)
            compared.append(module)
            return expected

        return run

    monkeypatch.setattr(capture, "_note", noted)
    model, example = make_architecture(name)
    report = bn.explain(model, example)
    assert len(compared) == report.graphs >= 1
    kinds = list(report.fused.values())
    assert ({kind: kinds.count(kind) for kind in kinds}, len(report.left)) == FUSED[name]
    assert all(report.left.values())
    said = {layer.split(" (call ")[0] for layer in (*report.fused, *report.left)}
    assert said == batch_norms(model, alike=True).keys()


def _tensors(output):
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return {str(at): v.detach() for at, v in enumerate(leaves) if torch.is_tensor(v)}


def _losses(model, run, example):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    found = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = next(v for v in dict(run(*example)).values()).square().mean().log1p()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_of_training(name):
    model, example = make_architecture(name)
    # of two examples alone, all gradients through a batch norm are rounding
    example = [torch.cat([v, *(torch.randn_like(v) for _ in range(3))]).double() for v in example]
    model = model.double().train(name not in RANDOM)
    for layer in batch_norms(model).values():
        layer.train()
    stock = copy.deepcopy(model)
    fast = bn.accelerate(model, save_memory=True)
    expected, actual = _losses(stock, stock, example), _losses(model, fast, example)
    assert expected[-1] != expected[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    assert_same(buffers_of(model), buffers_of(stock), 1e-8)

    kept = [
        kept_bytes(dict(run(*example)), exclude=[*m.parameters(), *m.buffers(), *example])
        for m, run in ((model, fast), (stock, stock))
    ]
    assert kept[0] < kept[1]
