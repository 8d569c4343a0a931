"""Claim 16: a wrong gradient is found, and the verdict turns with what gamma and beta became."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from study.small import plan_of, small_data, small_plan, studied
from torch.nn.functional import batch_norm

from batchnorm.study import recipes
from batchnorm.study.claims import judge
from batchnorm.study.claims.learned_affine import CLAIM, gamma_and_beta
from batchnorm.study.interactive import figure
from batchnorm.study.measures import learned_affine as quotients
from batchnorm.study.measures.learned_affine import Errors, GradientCheck
from batchnorm.study.networks import NETWORKS, build, norms
from batchnorm.study.observation import Result, State
from batchnorm.study.pictures import png
from batchnorm.study.recipes import NORMALIZED
from batchnorm.study.tasks import fingerprint

DATA = small_data()


class Wrong(torch.nn.BatchNorm1d):
    """Batch normalization whose gamma and beta get a gradient that is a little too long."""

    def forward(self, x):
        weight, bias = (1.001 * p - 0.001 * p.detach() for p in (self.weight, self.bias))
        return batch_norm(x, None, None, weight, bias, training=True)


class TestTheGradients:
    def check(self, name, seed=0):
        return GradientCheck(fingerprint(DATA), NETWORKS[name], 0.5, seed)

    @pytest.mark.parametrize("name", ["sigmoid", "elu", "tanh"])
    def test_they_are_difference_quotients(self, name):
        errors = self.check(name).perform(DATA).errors
        assert {key: len(of) for key, of in errors.items()} == {"gamma": 12, "beta": 12}
        assert 0 < max(map(max, errors.values())) < 1e-6

    def test_a_gradient_that_is_too_long_is_found(self, monkeypatch):
        monkeypatch.setattr(recipes, "norm_layer", lambda _, features, *__: Wrong(features))
        errors = self.check("sigmoid").perform(DATA).errors
        for of in errors.values():
            assert max(of) == pytest.approx(1e-3, rel=0.9)
            assert max(of) > 1e-6

    def test_gamma_has_moved_before(self, monkeypatch):
        seen = []

        def spy(model, batch, parameter, generator):
            seen.append(parameter.detach().clone())
            return [0.0]

        monkeypatch.setattr(quotients, "_errors", spy)
        self.check("sigmoid").perform(DATA)
        gammas, betas = seen[:3], seen[3:]
        assert all((gamma - 1).abs().max() > 1e-3 for gamma in gammas)
        assert all(beta.abs().max() > 1e-3 for beta in betas)
        assert gammas[0].dtype == torch.float64

    def test_they_are_tried_without_a_kink(self):
        plan = small_plan(DATA)
        for name, activation in (("conv", "elu"), ("sigmoid", "sigmoid")):
            checks = [t for t in CLAIM.tasks(plan, name) if isinstance(t, GradientCheck)]
            assert {check.network.activation for check in checks} == {activation}


def test_gamma_and_beta_are_seen_at_the_end():
    model = build(NETWORKS["conv"], NORMALIZED, DATA.shape, 10, seed=0)
    norms(model)[1].weight.data[3] = 0.25
    batch = torch.from_numpy(DATA.train_inputs[:60]), torch.from_numpy(DATA.train_labels[:60])
    state = State(model, 5, True, 1.0, batch, batch, batch, DATA)
    seen = gamma_and_beta(state)
    assert [len(of) for of in seen["gamma"]] == [8, 16, 32]
    assert (seen["gamma"][1][3], seen["gamma"][0], seen["beta"][0]) == (0.25, [1.0] * 8, [0.0] * 8)
    assert gamma_and_beta(replace(state, last=False)) is None


def judged(store, gamma=0.3, beta=0.1, error=1e-9, reason="", broken=""):
    """A judgement of layers whose gamma and beta moved so far."""
    plan = plan_of(1.0)
    for task in CLAIM.tasks(plan, "conv"):
        if isinstance(task, GradientCheck):
            errors = {"gamma": [1e-12, error], "beta": [1e-10, 1e-11]}
            store.add(task, Errors(errors={} if broken else errors, reason=broken))
            continue
        far = 1 + 0.1 * task.seed
        seen = {
            "gamma": [[1 + gamma * far, 1 - gamma * far], [1 + gamma * far]],
            "beta": [[beta * far, -beta * far], [beta * far]],
        }
        observed = {"gamma_and_beta": [[9, seen]]}
        store.add(task, Result(losses=[1.0], observed=observed, reason=reason))
    return judge(CLAIM, ["conv"], plan, store)


def test_right_gradients_that_moved_them_hold(store):
    judgement = judged(store)
    assert judgement.answer == "holds"
    (found,) = judgement.findings
    spread = np.sqrt((0.3**2 + 0.33**2 + 0.36**2) / 3 - 0.11**2)
    assert found.with_ == f"1.11 ± {spread:.2f}"
    assert (found.without, found.effect) == ("1 ± 0", "moved by 0.33")
    values = {(row.condition, row.measure): row.values for row in found.rows}
    change = values["batchnorm", "beta, change (root mean square)"]
    assert change == pytest.approx([0.1, 0.11, 0.12])
    assert values["layer 1", "gamma, mean"] == pytest.approx([1, 1, 1])
    assert values["layer 1", "gamma, spread"] == pytest.approx([0.3, 0.33, 0.36])
    assert values["batchnorm", "error of the gradient of gamma"] == [1e-9] * 3
    gammas, _ = judgement.charts[0].panels
    first, second, start = gammas.series
    assert [line.name for line in gammas.series] == ["layer 1", "layer 2", "start"]
    assert (start.x, start.y[0]) == ([1.0, 1.0], 0.0)
    assert sum(first.y) / 2 == pytest.approx(100)  # each bin has two corners
    assert max(np.array(first.x)[np.array(first.y) > 0]) == pytest.approx(1.36)
    assert min(np.array(second.x)[np.array(second.y) > 0]) == pytest.approx(1.3, abs=0.03)
    assert first.low == ()
    for chart in judgement.charts:
        assert all(figure(panel)["data"] for panel in chart.panels)
        assert png(chart)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"error": 1e-5}, [False, True, True, True]),
        ({"gamma": 0.005}, [True, False, True, True]),
        ({"beta": 0.0}, [True, True, True, False]),
    ],
)
def test_each_check_turns(store, changes, expected):
    assert list(judged(store, **changes).findings[0].checks.values()) == expected


@pytest.mark.parametrize("where", ["reason", "broken"])
def test_what_broke_off_is_not_measured(store, where):
    judgement = judged(store, **{where: "no luck"})
    assert judgement.answer == "not measured"
    assert "no luck" in judgement.findings[0].sentence
    assert judgement.charts == []


@pytest.mark.parametrize("trained", [True, False])
def test_it_is_training_that_moves_them(store, monkeypatch, trained):
    plan = small_plan(DATA, steps=30)
    if not trained:  # as if the gradients were right, but no step were taken
        monkeypatch.setattr("batchnorm.study.training.step", lambda *_: 1.0)
    (found,) = studied(CLAIM, "sigmoid", plan, DATA, store).findings
    assert list(found.checks.values()) == [True, trained, True, trained]
