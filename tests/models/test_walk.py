"""The walk: every batch norm of a model, ours and theirs, once, and those that are asked for."""

import pytest
import torch
from models.foreign import Frozen
from torch import nn

import batchnorm as bn
from batchnorm.models.walk import batch_norms


class Network(nn.Module):
    """Layers of ours and of torch, nested, one used twice, one that is none of a batch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.body = nn.ModuleList([nn.Sequential(bn.GhostBatchNorm(4), nn.ReLU())])
        self.shared = self.body[0][0]
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.banks = bn.BankedBatchNorm(4, banks=("real", "fake"))


NAMES = ["stem.1", "body.0.0", "banks.banks.real", "banks.banks.fake"]


def test_finds_every_layer_once_in_the_order_of_the_model():
    model = Network()
    found = batch_norms(model)
    assert list(found) == NAMES
    assert found["stem.1"] is model.stem[1]
    assert found["body.0.0"] is model.shared


def test_a_layer_itself_has_an_empty_name():
    layer = bn.BatchNorm(3)
    assert batch_norms(layer) == {"": layer}
    assert batch_norms(layer, "") == {"": layer}
    assert batch_norms(nn.Linear(3, 3)) == {}


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("stem.1", ["stem.1"]),
        ("body.*", ["body.0.0"]),
        ("*", NAMES),
        ("banks.banks.[rf]*", NAMES[2:]),
        (["banks.*", "stem.*"], ["stem.1", *NAMES[2:]]),
        (("stem.?",), ["stem.1"]),
        ((name for name in ("stem.1", "*.real")), ["stem.1", "banks.banks.real"]),
        (lambda name, layer: type(layer) is nn.BatchNorm2d, ["stem.1"]),
        (lambda name, layer: name.endswith("fake"), ["banks.banks.fake"]),
    ],
)
def test_where_chooses_in_the_order_of_the_model(where, names):
    assert list(batch_norms(Network(), where)) == names


@pytest.mark.parametrize("where", ["stem.0", ["stem.1", "stem.0"], "shared"])
def test_a_pattern_that_names_none_is_an_error_that_says_what_there_is(where):
    pattern = where if isinstance(where, str) else where[1]
    message = f"where has '{pattern}', which is the name of no batch norm of this Network; it has "
    with pytest.raises(ValueError, match=message + ", ".join(f"'{name}'" for name in NAMES)):
        batch_norms(Network(), where)


def test_a_model_without_any_says_so():
    with pytest.raises(ValueError, match=r"of this Linear; it has none"):
        batch_norms(nn.Linear(3, 3), "*")


def test_names_are_matched_with_their_case():
    with pytest.raises(ValueError, match=r"'Stem\.1'"):
        batch_norms(Network(), "Stem.1")


def test_modules_of_other_classes_count_where_a_tool_asks_for_them():
    model = nn.Sequential(Frozen(3), nn.BatchNorm1d(3), Frozen(3), nn.Linear(3, 3))
    model[2].running_var = None
    model.append(nn.InstanceNorm1d(3, track_running_stats=True))
    assert list(batch_norms(model)) == ["1"]
    assert list(batch_norms(model, alike=True)) == ["0", "1"]
    assert list(batch_norms(model, "0", alike=True)) == ["0"]
    with pytest.raises(ValueError, match=r"where has '0', .*; it has '1'"):
        batch_norms(model, "0")


TOOLS = {
    "convert": bn.convert,
    "revert": bn.revert,
    "freeze": bn.freeze,
    "unfreeze": bn.unfreeze,
    "synchronize": bn.synchronize,
    "unsynchronize": bn.unsynchronize,
    "transaction": bn.transaction,
    "calibrate": lambda model, where: bn.calibrate(model, [torch.zeros(2, 3)], where=where),
    "reduce_statistics": bn.reduce_statistics,
    "assert_statistics_agree": bn.assert_statistics_agree,
    "big_batch": lambda model, where: bn.big_batch(
        model, [torch.zeros(2, 3)], lambda model, part: model(part).sum(), where=where
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_takes_where(tool):
    model = nn.Sequential(bn.BatchNorm(3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"where has 'head\.\*'.*it has '0', '1'"):
        TOOLS[tool](model, where="head.*")
    done = TOOLS[tool](model, where="1")
    if hasattr(done, "done"):
        assert [*done.done, *done.left] == ["1"]


def test_reports_say_what_was_done_and_left_and_are_plain_data():
    report = bn.freeze(nn.Sequential(bn.BatchNorm(3), bn.BatchNorm(3, track_running_stats=False)))
    reason = "it has no running statistics to normalize by"
    assert report.to_dict() == {"verb": "frozen", "done": ["0"], "left": {"1": reason}}
    assert repr(report) == f"1 frozen: 0\n  left 1: {reason}"
    many = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(40)])
    assert repr(bn.freeze(many)) == "40 frozen: 0 ... 39"
    assert repr(bn.unfreeze(many)) == "40 unfrozen: 0 ... 39"
    assert repr(bn.unfreeze(many)) == "0 unfrozen\n  left 0 ... 39 (40): it was not frozen"
    long = nn.ModuleDict({"x" * 70: nn.BatchNorm1d(3)})
    assert repr(bn.freeze(long)) == f"1 frozen: {'x' * 70}"
    assert repr(bn.unfreeze(bn.BatchNorm(3))) == "0 unfrozen\n  left itself: it was not frozen"


@pytest.mark.parametrize("where", [[], (), lambda name, layer: False])
def test_what_chooses_none_is_an_error_that_says_what_there_is(where):
    with pytest.raises(ValueError, match=r"where is .* no batch norm of this Network; .*'stem\.1'"):
        batch_norms(Network(), where)
