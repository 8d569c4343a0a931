"""Claim 10: raw inputs, and a verdict that turns where they are not badly scaled."""

from dataclasses import replace

import numpy as np
import pytest
from study.small import result, small_data, small_plan, studied

from batchnorm.study.claims import judge, raw_inputs
from batchnorm.study.claims.raw_inputs import CLAIM
from batchnorm.study.interactive import figure
from batchnorm.study.measures.treatments import badly_scaled, standardized
from batchnorm.study.pictures import png
from batchnorm.study.store import Store

DATA = small_data()
PLAN = small_plan(DATA, seeds=(0, 1, 2))


def test_features_get_scales_of_their_own():
    scaled = badly_scaled(DATA)
    assert scaled.shape == (64, 1, 1)
    assert scaled.train_inputs.dtype == np.float32
    before, after = DATA.train_inputs.reshape(120, 64), scaled.train_inputs.reshape(120, 64)
    spread = before.std(0) > 0
    scales = after.std(0)[spread] / before.std(0)[spread]
    assert 0.1 <= scales.min() < 1 < 100 < scales.max() <= 1001
    assert np.ptp(after[:, ~spread], axis=0).max() == 0  # constant ones stay so
    moved = np.abs(after.min(0)[spread] - scales * before.min(0)[spread]) / scales
    assert 1 < moved.max() < 3.1
    # Held-out examples are scaled as the others.
    both = np.concatenate([DATA.train_inputs[:1], DATA.test_inputs])
    again = badly_scaled(replace(DATA, test_inputs=both))
    assert np.array_equal(again.test_inputs[0], scaled.train_inputs[0])


def test_standardized_features_have_mean_0_and_variance_1():
    features = standardized(DATA).train_inputs.reshape(120, 64)
    assert np.abs(features.mean(0)).max() < 1e-3
    constant = DATA.train_inputs.reshape(120, 64).std(0) == 0
    assert constant.any()
    assert (features[:, constant] == 0).all()
    assert features[:, ~constant].std(0) == pytest.approx(1, abs=1e-3)


def judged(store, plain, scaled, first, others=0.7):
    """A judgement of runs that end with accuracies of which the last rate's are the best."""
    ends = {
        (False, badly_scaled, False): plain,
        (False, standardized, False): others,
        (True, badly_scaled, False): others,
        (True, standardized, False): scaled,
        (True, badly_scaled, True): first,
    }
    tasks = CLAIM.tasks(PLAN, "relu")
    for run in tasks:
        end = ends[run.recipe.normalized, run.treatment, run.recipe.first]
        rates = [of.learning_rate for of in tasks if of.recipe == run.recipe]
        store.add(run, result([end if run.learning_rate == max(rates) else 0.1]))
    return judge(CLAIM, ["relu"], PLAN, store)


@pytest.mark.parametrize(
    ("plain", "scaled", "first", "checks"),
    [
        (0.5, 0.95, 0.94, [True, True]),
        (0.5, 0.95, 0.92, [False, True]),
        (0.93, 0.95, 0.94, [True, False]),
        (0.93, 0.95, 0.92, [False, False]),
    ],
)
def test_each_check_can_fail(store, plain, scaled, first, checks):
    (found,) = judged(store, plain, scaled, first).findings
    assert list(found.checks.values()) == checks
    assert (found.without, found.with_) == (f"{100 * scaled:.1f}%", f"{100 * first:.1f}%")
    assert found.rows[0].values == pytest.approx([100 * plain] * 3)


def test_the_chart_is_drawn(store):
    (chart,) = judged(store, 0.5, 0.95, 0.94).charts
    assert figure(chart.panels[0])["data"]
    assert png(chart)


def test_nothing_learned_is_not_measured(store):
    assert judged(store, 0.1, 0.1, 0.12, 0.1).answer == "not measured"


def test_it_turns_where_features_are_not_badly_scaled(store, tmp_path, monkeypatch):
    # Features that are constant in so few examples, and vary in others, would decide all else.
    varied = DATA.train_inputs.std(0) > 0.25

    def chosen(inputs):
        return inputs[:, varied][:, :, None, None]

    train, test = chosen(DATA.train_inputs), chosen(DATA.test_inputs)
    data = replace(DATA, train_inputs=train, test_inputs=test)
    monkeypatch.setattr(raw_inputs, "_SMALL", (1e-3, 1))
    plan = small_plan(data, steps=120, rates=(0.1,))
    better = "better than plain on raw inputs"
    assert studied(CLAIM, "relu", plan, data, store).findings[0].checks[better]
    monkeypatch.setattr(raw_inputs, "badly_scaled", lambda data_set: data_set)
    with Store(tmp_path / "scaled") as fresh:
        assert not studied(CLAIM, "relu", plan, data, fresh).findings[0].checks[better]
