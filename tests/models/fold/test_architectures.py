"""Folding in published architectures, as they are: every layer of every one is gone."""

import pytest
from architectures import ARCHITECTURES, make_architecture
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn

#: How many batch norms each has.
FOLDED = {
    "resnet": 12,
    "regnet": 17,
    "mobilenet_v1": 27,
    "mobilenet_v2": 52,
    "efficientnet": 25,
    "mobilevit": 32,
    "levit": 27,
    "segformer": 1,
    "swiftformer": 14,
    "detr": 9,
    "rt_detr": 60,
    "wav2vec2_conformer": 2,
    "fastspeech2_conformer": 7,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_every_layer_is_folded(name):
    model, example = make_architecture(name)
    folded, report = bn.fold(model, example)
    assert len(report.folded) == FOLDED[name]
    assert report.left == {}
    assert report.max_error <= 1e-5
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    assert not any("running_mean" in key for key in folded.state_dict())
    assert not any(type(m).__module__.startswith("batchnorm") for m in folded.modules())
    assert all(len(line) <= 80 for line in repr(report).splitlines())
