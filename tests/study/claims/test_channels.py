"""Claim 19: moments by channel move with the picture, moments by position do not."""

from dataclasses import replace

import pytest
import torch
from study.small import small_data, small_plan, studied

from batchnorm.study.claims import Finding, Row, all_claims, channels, judge
from batchnorm.study.claims.channels import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.interval import Interval
from batchnorm.study.measures import channels as measured
from batchnorm.study.measures import implementations
from batchnorm.study.measures.channels import Compared
from batchnorm.study.measures.runs import NotMeasured
from batchnorm.study.pictures import png

DATA = small_data()
PLAN = small_plan(DATA, seeds=(0, 1, 2))
NAMES = ("reference", "torch.nn", "batchnorm")


def test_it_holds_on_pictures(store):
    judgement = studied(CLAIM, "layer", PLAN, DATA, store)
    assert judgement.answer == "holds"
    learned = {row.condition: row.values for row in judgement.findings[0].rows[-2:]}
    assert learned == {"by channel": [16], "by position": [2 * 8 * 64]}
    (chart,) = judgement.charts
    assert [panel.title for panel in chart.panels] == ["moments by channel", "moments by position"]
    assert all(figure(panel)["data"] for panel in chart.panels)
    assert png(chart)


def test_features_have_no_positions(store):
    features = replace(
        DATA,
        train_inputs=DATA.train_inputs.reshape(120, 64, 1, 1),
        test_inputs=DATA.test_inputs.reshape(50, 64, 1, 1),
    )
    judgement = studied(CLAIM, "layer", small_plan(features), features, store)
    assert judgement.answer == "not measured"
    assert "no positions" in judgement.findings[0].sentence


def test_what_is_moved_is_moved_in_each_example():
    x = torch.arange(8.0).view(2, 1, 2, 2)
    assert measured._rolled(x, [(1, 0), (0, 1)]).flatten().tolist() == [2, 3, 0, 1, 5, 4, 7, 6]
    places = torch.tensor([[[3, 2, 1, 0]], [[0, 1, 3, 2]]])
    assert measured._permuted(x, places).flatten().tolist() == [3, 2, 1, 0, 4, 5, 7, 6]
    # A filter that looks to the left sees the last column from the first one.
    left = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 0]]).view(1, 1, 3, 3)
    assert measured._convolved(x[:1], left).flatten().tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("wrong", range(5))
def test_each_check_can_fail(store, wrong):
    values = [0.0, 0.0, 0.0, 1.0]
    if wrong != 1:
        place = (0, None, 1, 2, 3)[wrong]
        values[place] = 1.0 - values[place]
    whats = ("rows (N·H·W, C)", "positions permuted", *channels_rolled())
    for task in CLAIM.tasks(PLAN, "layer"):
        largest = {what: dict.fromkeys(NAMES, v) for what, v in zip(whats, values, strict=True)}
        learned = [17 if wrong == 1 else 16, 1024]
        store.add(task, Compared(largest=largest, parameters=learned))
    checks = list(judge(CLAIM, ["layer"], PLAN, store).findings[0].checks.values())
    assert checks == [place != wrong for place in range(5)]


def channels_rolled():
    return "rolled, moments by channel", "rolled, moments by position"


def test_it_turns_where_a_layer_normalizes_by_position(store, monkeypatch):
    right = implementations.NORMALIZE["batchnorm"]

    def by_position(x, gamma, beta, eps=1e-5):
        if x.ndim == 2:
            return right(x, gamma, beta, eps)
        each = [value.repeat_interleave(x[0, 0].numel()) for value in (gamma, beta)]
        return right(x.flatten(1), *each, eps).view_as(x)

    changed = {**implementations.NORMALIZE, "batchnorm": by_position}
    monkeypatch.setattr(measured, "NORMALIZE", changed)
    checks = studied(CLAIM, "layer", PLAN, DATA, store).findings[0].checks
    assert list(checks.values()) == [False, True, False, False, True]


OTHERS = {1: "fewer_steps", 3: "learning_rates", 7: "internal_shift", 12: "landscape"}


def gathered(store, monkeypatch, findings):
    """A judgement of what the other claims find: checks, or why there are none."""

    def finds(claim):
        def measure(plan, part, store):
            found = findings.get(claim.number, [True])
            if isinstance(found, str):
                raise NotMeasured(found)
            rows = [
                Row("plain", "steps", [2.0]),
                Row("batchnorm", "steps", [1.0], Interval(2, 1, 3)),
            ]
            return Finding(part, "", checks=dict(zip("abc", found, strict=False)), rows=rows)

        return replace(claim, measure=measure)

    monkeypatch.setattr(channels, "_OTHERS", list(map(finds, channels._OTHERS)))
    return judge(CLAIM, ["conv"], PLAN, store)


def test_what_other_claims_find_for_a_network_is_gathered(store, monkeypatch):
    judgement = gathered(store, monkeypatch, {7: [True, False], 12: [False]})
    assert judgement.answer == "depends"
    (found,) = judgement.findings
    assert found.checks == {"1: a": True, "3: a": True, "7: a": True, "7: b": False, "12: a": False}
    assert found.effect == "3 of 5 checks hold"
    assert "claim 3 (Higher learning rates) holds; claim 7 (" in found.sentence
    assert "internal covariate shift) depends; claim 12 (" in found.sentence
    assert found.sentence.endswith("next layer) does not hold.")
    assert [row.measure for row in found.rows] == [f"{number}: steps" for number in OTHERS]
    assert all(row.effect for row in found.rows)
    assert judgement.charts == []


def test_what_was_not_measured_is_told(store, monkeypatch):
    (found,) = gathered(store, monkeypatch, {3: "Nothing was learned."}).findings
    assert list(found.checks) == ["1: a", "7: a", "12: a"]
    assert found.sentence.endswith("holds. Claim 3 was not measured: Nothing was learned.")


def test_where_nothing_was_measured_it_says_why(store, monkeypatch):
    judgement = gathered(store, monkeypatch, dict.fromkeys(OTHERS, "Nothing was learned."))
    assert judgement.answer == "not measured"
    assert judgement.findings[0].sentence.count("Nothing was learned.") == len(OTHERS)


def test_networks_cost_nothing_beside_the_other_claims():
    claims = {claim.number: claim for claim in all_claims()}
    assert {number: claims[number].name for number in OTHERS} == OTHERS
    theirs = {task for number in OTHERS for task in claims[number].tasks(PLAN, "conv")}
    assert set(CLAIM.tasks(PLAN, "conv")) == theirs


def test_what_broke_off_is_not_measured(store):
    for task in CLAIM.tasks(PLAN, "layer"):
        store.add(task, Compared(reason="no memory"))
    assert judge(CLAIM, ["layer"], PLAN, store).answer == "not measured"
