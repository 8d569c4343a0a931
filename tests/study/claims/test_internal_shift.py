"""Claim 7: shifts that are known are measured as such, and the verdict turns with them."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from study.small import plan_of, small_data, small_plan, studied, without_normalization
from torch.nn.functional import cross_entropy

from batchnorm.study import networks
from batchnorm.study.claims import judge
from batchnorm.study.claims.internal_shift import CLAIM
from batchnorm.study.descent import step
from batchnorm.study.interactive import figure
from batchnorm.study.measures.internal_shift import (
    UNITS,
    distribution_shift,
    gradient_shift,
    hellinger,
    kept,
    moved,
    moved_before,
    turned,
    wandered,
)
from batchnorm.study.networks import NETWORKS, build, maps
from batchnorm.study.observation import Result, State
from batchnorm.study.pictures import png
from batchnorm.study.recipes import NORMALIZED, PLAIN

DATA = small_data()


def state_of(model, rate=0.5):
    """What a probe sees of a network before a step."""
    torch.manual_seed(0)
    held_out = torch.from_numpy(DATA.test_inputs), torch.from_numpy(DATA.test_labels)
    batch = torch.from_numpy(DATA.train_inputs[:60]), torch.from_numpy(DATA.train_labels[:60])
    return State(model, 0, False, rate, batch, held_out, held_out, DATA)


def moments(*pairs):
    return torch.tensor(pairs, dtype=torch.float64).T


class TestHellinger:
    @pytest.mark.parametrize("second", [(0.0, 1.0), (1.0, 1.0), (0.3, 4.0), (-2.0, 0.5)])
    def test_it_is_that_of_the_densities(self, second):
        x = np.linspace(-30, 30, 200_001)

        def density(mean, variance):
            return np.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

        overlap = np.sqrt(density(0, 1) * density(*second)).sum() * (x[1] - x[0])
        expected = math.sqrt(max(0, 1 - overlap))
        assert hellinger(moments((0, 1)), moments(second)).item() == pytest.approx(
            expected, abs=1e-5
        )

    def test_the_scale_does_not_count(self):
        near = hellinger(moments((1, 4)), moments((2, 9)))
        far = hellinger(moments((1000, 4e6)), moments((2000, 9e6)))
        assert near.item() == pytest.approx(far.item())

    def test_a_unit_that_never_changes_has_a_distance(self):
        constant = moments((3, 0), (3, 0))
        assert hellinger(constant, constant).tolist() == [0, 0]
        assert hellinger(constant, moments((4, 0), (3, 1))).tolist() == pytest.approx([1, 1])
        assert hellinger(moments((math.nan, 1)), moments((0, 1))).item() == 1


class TestDistributionShift:
    @pytest.mark.parametrize("recipe", [PLAIN, NORMALIZED])
    @pytest.mark.parametrize("name", ["sigmoid", "conv", "residual"])
    def test_nothing_moves_at_the_rate_0(self, name, recipe):
        model = build(NETWORKS[name], recipe, DATA.shape, 10, seed=0)
        before = copy.deepcopy(model.state_dict())
        assert max(distribution_shift(state_of(model, 0.0))["moved"]) == 0
        assert min(distribution_shift(state_of(model, 0.5))["moved"]) > 0
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])

    def test_channels_are_pooled_over_positions(self):
        model = build(NETWORKS["conv"], PLAIN, DATA.shape, 10, seed=0)
        state = state_of(model)
        z = model[0][:5](state.held_out[0]).detach()  # what the third activation gets
        assert z.shape[1:] == (32, 2, 2)
        seen = distribution_shift(state)
        assert np.shape(seen["percentiles"]) == (UNITS, 3)
        for channel in (0, UNITS - 1):
            expected = np.percentile(z[:, channel].numpy(), [15, 50, 85])
            assert seen["percentiles"][channel] == pytest.approx(expected.tolist(), rel=1e-5)
        assert len(seen["put_out"]) == 3  # not the classes'
        # Without normalization an activation gets what its map puts out.
        assert seen["put_out"] == seen["moved"]
        step(model, *state.batch, state.rate)
        moved = model[0][:5](state.held_out[0]).detach()
        values = [of.double().transpose(0, 1).flatten(1) for of in (z, moved)]
        pair = [torch.stack([of.mean(1), of.var(1, correction=0)]) for of in values]
        assert seen["moved"][2] == pytest.approx(hellinger(*pair).mean().item(), rel=1e-4)

    def test_behind_batch_normalization_beta_moves_the_mean(self):
        model = build(NETWORKS["sigmoid"], NORMALIZED, DATA.shape, 10, seed=0)
        state = state_of(model, 0.05)
        shift = distribution_shift(state)["moved"]
        layers = networks.norms(model)
        step(model, *state.batch, state.rate)
        for seen, layer in zip(shift, layers, strict=True):
            after = torch.stack([layer.bias, layer.weight**2]).double()
            start = moments(*[(0.0, 1.0)] * len(layer.bias))
            assert seen == pytest.approx(hellinger(start, after).mean().item(), rel=1e-2)


class TestGradientShift:
    def test_the_layers_before_have_taken_their_step(self):
        model = build(NETWORKS["sigmoid"], PLAIN, DATA.shape, 10, seed=0)
        state = state_of(model)
        ((_, _), (far, cosine), (_, _)) = gradient_shift(state)

        def gradient(of):
            loss = cross_entropy(of(state.batch[0]), state.batch[1])
            return torch.autograd.grad(loss, maps(of)[2].weight)[0]

        after = copy.deepcopy(model)
        step(after, *state.batch, state.rate)
        mixed = copy.deepcopy(model)
        for layer in (1, 3):  # behind Flatten: the linear maps before the third
            mixed[0][layer].load_state_dict(after[0][layer].state_dict())
        was, now = gradient(model), gradient(mixed)
        assert far == pytest.approx(float((now - was).norm() / was.norm()), rel=1e-4)
        assert cosine == pytest.approx(float((now * was).sum() / was.norm() / now.norm()), rel=1e-4)

    @pytest.mark.parametrize("name", ["sigmoid", "conv", "residual"])
    def test_nothing_turns_at_the_rate_0(self, name):
        model = build(NETWORKS[name], NORMALIZED, DATA.shape, 10, seed=0)
        seen = gradient_shift(state_of(model, 0.0))
        assert len(seen) == len(maps(model)) - 1
        assert max(far for far, _ in seen) < 1e-5
        assert min(cosine for _, cosine in seen) == pytest.approx(1)


def test_what_broke_is_finite():
    model = build(NETWORKS["relu"], PLAIN, DATA.shape, 10, seed=0)
    with torch.no_grad():
        maps(model)[0].weight.fill_(math.inf)
    seen = distribution_shift(state_of(model)), gradient_shift(state_of(model))
    numbers = [*seen[0]["moved"], *np.ravel(seen[0]["percentiles"]), *np.ravel(seen[1])]
    assert np.isfinite(numbers).all()


def seen_by(shift, units, far, put_out=None, **more):
    """The result of a run with two looks."""
    outputs = [4 * shift] if put_out is None else [put_out]
    looks = [
        {"percentiles": unit, "moved": [shift, 3 * shift], "put_out": outputs} for unit in units
    ]
    observed = {
        "distribution_shift": [[step, look] for step, look in zip((0, 9), looks, strict=True)],
        "gradient_shift": [[0, [[far, 0.9], [far, 0.7]]], [9, [[4 * far, 0.5], [4 * far, 0.5]]]],
    }
    return Result(losses=[1.0] * 5 + [0.8] * 4, observed=observed, **more)


def test_the_looks_are_averaged():
    units = [[[0, 1, 2], [0, 0, 0], [0, 2, 8]], [[1, 2, 3], [0, 0, 0], [0, 4, 8]]]
    made = seen_by(0.1, units, 0.2)
    assert moved(made) == pytest.approx([0.2, 0.2])
    assert turned(made) == pytest.approx([0.2, 0.8])
    assert kept(made) == pytest.approx([0.8, 0.5])
    assert moved_before(made) == pytest.approx([0.4, 0.4])
    # The first unit wanders by 1 of 2, the constant one not at all, the last by 2/3 of 8.
    assert wandered(made) == pytest.approx(2 / 3 / 8)


def judged(store, moves=0.1, ranges=0.2, gradients=0.5, outputs=0.3, reason=""):
    """A judgement, with normalization, of these ratios to the plain network."""
    plan = plan_of(1.0)
    for run in CLAIM.tasks(plan, "conv"):
        ours = run.recipe.normalized
        far = 1 + 0.01 * run.seed
        wide = (ranges if ours else 1.0) * far
        units = [[[0, 1, 2]], [[wide, 1 + wide, 2 + wide]]]
        made = seen_by(
            (moves if ours else 1.0) * 0.1 * far,
            units,
            (gradients if ours else 1.0) * far,
            (outputs if ours else 1.0) * 0.2 * far,
        )
        store.add(run, replace(made, reason=reason))
    return judge(CLAIM, ["conv"], plan, store)


def test_smaller_shifts_hold(store):
    judgement = judged(store)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    assert found.effect == "0.1× (0.1–0.1)"
    assert (found.without, found.with_) == ("0.202", "0.0202")
    effects = {(row.condition, row.measure): str(row.effect) for row in found.rows if row.effect}
    assert effects["batchnorm, learning", "the same of maps' outputs"] == "0.3× (0.3–0.3)"
    assert effects["batchnorm", "range of percentiles, in spreads"] == "0.2× (0.2–0.2)"
    assert effects["batchnorm, learning", "cosine of the gradients"] == "0 (0 to 0)"
    rows = {(row.condition, row.measure): row.values for row in found.rows}
    change = "change of the gradients, share"
    assert rows["plain, before it learns", change] == pytest.approx([1, 1.01, 1.02])
    assert rows["plain, learning", change] == pytest.approx([4, 4.04, 4.08])
    percentiles, shifts = judgement.charts
    assert len(shifts.panels) == 2
    assert percentiles.panels[0].series[0].x == [1, 10]
    for chart in judgement.charts:
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moves": 1.0}, [False, True, True, True]),
        ({"outputs": 1.2}, [True, False, True, True]),
        ({"ranges": 2.0}, [True, True, False, True]),
        ({"gradients": 4.7}, [True, True, True, False]),
        ({"moves": 1.1, "outputs": 1.0, "ranges": 1.0, "gradients": 1.0}, [False] * 4),
    ],
)
def test_each_check_turns(store, changes, expected):
    assert list(judged(store, **changes).findings[0].checks.values()) == expected


def test_runs_that_broke_off_are_not_measured(store):
    judgement = judged(store, reason="the loss was nan at step 3")
    assert judgement.answer == "not measured"
    assert "the loss was nan at step 3" in judgement.findings[0].sentence
    assert judgement.charts == []


@pytest.mark.parametrize(("normalized", "answer"), [(True, "holds"), (False, "does not hold")])
def test_it_is_normalization_that_does_it(store, monkeypatch, normalized, answer):
    if not normalized:
        without_normalization(monkeypatch)
    plan = small_plan(DATA, steps=20)
    assert studied(CLAIM, "relu", plan, DATA, store).answer == answer
