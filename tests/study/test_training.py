"""A run: its losses to the last digit, the same every time, and a result whatever happens."""

import sys
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from study.small import small_data
from torch.nn.functional import cross_entropy

from batchnorm.study import tasks
from batchnorm.study.data import load
from batchnorm.study.descent import batches, next_evaluation, one_thread, step
from batchnorm.study.networks import NETWORKS, build
from batchnorm.study.observation import Result
from batchnorm.study.recipes import NORMALIZED, PLAIN, TORCH, Recipe
from batchnorm.study.tasks import NotMeasured, Outcome
from batchnorm.study.training import Run, train

DATA = small_data()
SIGMOID = NETWORKS["sigmoid"]
RUN = Run("digits", SIGMOID, PLAIN, learning_rate=1.0, seed=0, steps=6)


def losses(recipe, data_set=DATA, **changes):
    return np.array(train(replace(RUN, recipe=recipe, **changes), data_set).losses)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # In float32 an operation rounds at 6e-8; a few hundred of them stand between two losses, and
    # every step hands its error on to the next one.
    [("float64", 1e-9), ("float32", 1e-4)],
)
def test_ours_gives_the_losses_of_torch_step_for_step(dtype, tolerance):
    theirs, ours = (
        losses(recipe, load("digits"), dtype=dtype, steps=207) for recipe in (TORCH, NORMALIZED)
    )
    assert len(theirs) == len(ours) == 207
    assert theirs[-1] < 0.2 < 2 < theirs[0]  # so that something was learned
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_ours_gives_the_losses_of_torch_in_the_convolutional_network():
    changes = {"dtype": "float64", "network": NETWORKS["conv"], "steps": 40, "learning_rate": 0.3}
    theirs, ours = (losses(recipe, **changes) for recipe in (TORCH, NORMALIZED))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert theirs[-1] < 0.5 * theirs[0]


def test_the_losses_are_those_of_gradient_descent():
    model = build(SIGMOID, PLAIN, DATA.shape, 10, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    order = np.random.default_rng(0)
    expected = []
    for _ in range(3):
        whole = order.permutation(120)
        for chosen in (whole[:60], whole[60:]):
            x = torch.from_numpy(DATA.train_inputs[chosen])
            loss = cross_entropy(model(x), torch.from_numpy(DATA.train_labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    np.testing.assert_allclose(losses(PLAIN), expected, rtol=1e-5)


def test_a_step_returns_the_loss_before_it():
    model = build(SIGMOID, PLAIN, DATA.shape, 10, seed=0)
    x, y = next(batches(DATA, 60, 0))
    before = cross_entropy(model(x), y).item()
    assert step(model, x, y, 0.5) == pytest.approx(before, rel=1e-6)
    assert step(model, x, y, 0.5) < before


def test_accuracy_is_of_the_held_out_examples_in_evaluation():
    result = train(replace(RUN, recipe=NORMALIZED, steps=80), DATA)
    assert result.steps[-1] == len(result.losses) == 80
    assert all(accuracy in {right / 50 for right in range(51)} for accuracy in result.accuracies)
    assert result.accuracies[-1] > 0.7 > 0.4 > result.accuracies[0]


def test_a_run_is_the_same_every_time_whatever_is_around_it():
    first = train(RUN, DATA)
    torch.manual_seed(123)
    torch.rand(7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = train(RUN, DATA)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert replace(first, seconds=0) == replace(again, seconds=0)


def test_a_run_leaves_random_numbers_and_threads_as_they_were():
    state = torch.get_rng_state()
    train(RUN, DATA)
    assert torch.equal(torch.get_rng_state(), state)
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == threads


def test_a_run_that_diverges_is_a_result_with_its_reason():
    result = train(replace(RUN, learning_rate=1e38), DATA)
    assert result.reason == "the loss was inf at step 2"
    assert len(result.losses) == len(result.accuracies) == 1
    assert np.isfinite(result.losses).all()


def test_batches_see_every_example_once_an_epoch_and_have_one_size():
    labelled = replace(DATA, train_labels=np.arange(120))
    seen = [y for _, (_, y) in zip(range(8), batches(labelled, 30, 0), strict=False)]
    for epoch in (seen[:4], seen[4:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(120))
    assert not torch.equal(seen[0], seen[4])
    sizes = {len(y) for _, (_, y) in zip(range(5), batches(DATA, 50, 0), strict=False)}
    assert sizes == {50}
    assert len(next(batches(DATA, 500, 0))[1]) == 120


def test_evaluations_are_as_far_apart_as_a_factor():
    steps = []
    while not steps or steps[-1] < 1000:
        steps.append(next_evaluation(steps))
    assert steps[:4] == [1, 2, 3, 4]
    assert all(b <= max(a + 1, 1.1 * a) for a, b in pairwise(steps))


def test_the_ends_are_those_of_the_trained_network():
    result = train(replace(RUN, recipe=NORMALIZED, steps=80, learning_rate=0.5), DATA)
    assert result.train_accuracy == 1.0
    assert 0 < result.train_loss < 0.1 < result.test_loss < 1
    assert result.accuracies[-1] < 1


def test_fewer_examples_are_the_same_ones_for_every_seed():
    few = [train(replace(RUN, examples=60, seed=seed, learning_rate=1e-9), DATA) for seed in (0, 1)]
    assert len({round(result.losses[0], 4) for result in few}) == 2  # other weights
    same = [
        train(replace(RUN, examples=60, steps=steps, learning_rate=1e-9), DATA) for steps in (1, 6)
    ]
    assert same[0].losses[0] == pytest.approx(same[1].losses[5], rel=1e-5)  # one batch is all


def relabelled(data_set):
    return replace(data_set, train_labels=np.zeros_like(data_set.train_labels))


def test_a_treatment_is_done_first():
    result = train(replace(RUN, recipe=NORMALIZED, treatment=relabelled, steps=30), DATA)
    assert result.losses[-1] < 0.01  # there is one class to learn
    assert result.accuracies[-1] < 0.3


def last_bias(state):
    return list(state.model.parameters())[-1][0].item()


def meddling(state):
    torch.rand(3)
    copy = state.copy()
    for parameter in copy.parameters():
        parameter.data.zero_()
    return {"loss": cross_entropy(copy(state.batch[0]), state.batch[1]).item()}


def nothing(state):
    return float("nan") if state.step < 4 else None


def test_probes_look_at_the_start_now_and_then_and_at_the_end():
    probed = replace(RUN, steps=8, recipe=Recipe("batchnorm", dropout="after"))
    result = train(replace(probed, probes=(last_bias, meddling, nothing)), DATA)
    assert result.at(last_bias) == [0, 2, 3, 5, 8]
    assert len(set(result.seen(last_bias))) == 5
    assert result.seen(meddling)[0] == {"loss": pytest.approx(np.log(10), rel=1e-6)}
    assert result.seen(nothing) == []
    assert result.losses == train(probed, DATA).losses  # as if nobody had looked


def test_runs_that_differ_in_probes_are_one():
    one, other = (replace(RUN, probes=(probe,)) for probe in (last_bias, meddling))
    assert one == other == RUN
    assert one.key == other.key == RUN.key
    both = one.united(other).united(one)
    assert both.probes == (last_bias, meddling)
    kept = train(one, DATA)
    assert one.answered_by(kept)
    assert RUN.answered_by(kept)
    assert not other.answered_by(kept)
    joined = train(other, DATA).joined(kept)
    assert one.answered_by(joined)
    assert both.answered_by(joined)


def test_a_run_that_broke_off_has_been_looked_at():
    probed = replace(RUN, probes=(last_bias,))
    assert probed.answered_by(train(replace(probed, learning_rate=1e38), DATA))
    assert probed.answered_by(probed.broken("lost"))
    assert probed.broken("lost").reason == "lost"


def failing(state):
    if state.step:
        raise RuntimeError("no luck")
    return 1.0


def test_a_probe_that_fails_stops_nothing_else():
    probed = replace(RUN, steps=4, probes=(failing, last_bias))
    result = train(probed, DATA)
    assert result.reason == ""
    assert result.losses == train(replace(RUN, steps=4), DATA).losses
    assert len(result.seen(last_bias)) == 4
    with pytest.raises(NotMeasured, match=r"Looking failed \(failing\): RuntimeError: no luck\."):
        result.seen(failing)
    assert probed.answered_by(result)


def test_a_probe_of_another_version_has_not_looked(monkeypatch):
    probed = replace(RUN, probes=(last_bias,))
    result = train(probed, DATA)
    assert probed.answered_by(result)
    module = sys.modules[last_bias.__module__]
    monkeypatch.setitem(tasks.VERSIONS, module.__name__, "@2")
    assert not probed.answered_by(result)


def test_a_whole_result_stays_when_a_second_attempt_is_lost():
    kept = Result(losses=[1.0], observed={"a": [[0, 1]]})
    joined = replace(RUN, probes=(last_bias,)).broken("lost").joined(kept)
    assert (joined.reason, joined.losses, joined.observed["a"]) == ("", [1.0], [[0, 1]])
    with pytest.raises(NotMeasured, match="lost"):
        joined.seen(last_bias)


def test_an_outcome_has_nothing_to_join():
    assert Outcome(reason="a").joined(Outcome(reason="b")) == Outcome(reason="a")
    assert Result(steps=[1]).joined(Result(steps=[2])).steps == [1]


CHANGED = {
    "data": "mnist",
    "network": NETWORKS["conv"],
    "recipe": NORMALIZED,
    "dtype": "float64",
    "treatment": relabelled,
}


@pytest.mark.parametrize("field", [field.name for field in fields(RUN) if field.name != "probes"])
def test_the_key_depends_on_every_field(field):
    assert replace(RUN, **{field: CHANGED.get(field, 7)}).key != RUN.key
    assert replace(RUN).key == RUN.key


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_the_key_depends_on_all_of_the_recipe(field):
    assert replace(RUN, recipe=replace(PLAIN, **{field: "other"})).key != RUN.key


def test_the_key_depends_on_what_a_network_is_not_on_how_it_is_mostly_trained():
    assert replace(RUN, network=replace(SIGMOID, rates=(1.0,), steps=1)).key == RUN.key
    assert replace(RUN, network=replace(SIGMOID, activation="relu")).key != RUN.key


def test_the_key_depends_on_the_file_of_an_extension(monkeypatch):
    treated = replace(RUN, treatment=relabelled)
    before = treated.key
    module = sys.modules[relabelled.__module__]
    monkeypatch.setitem(tasks.VERSIONS, module.__name__, "@1")
    assert treated.key != before


def test_a_run_says_what_it_is():
    assert str(RUN) == "sigmoid, plain, rate 1, seed 0"
    recipe = Recipe("ghost", "after", "before", "absent", "he", 0.5, 4, first=True)
    many = replace(RUN, recipe=recipe, dtype="float64", examples=9, batch_size=3)
    assert str(replace(many, treatment=relabelled)) == (
        "sigmoid, ghost, after the activation, dropout before, gamma and beta absent, he, "
        "momentum 0.5, groups of 4, inputs first, relabelled, 9 examples, batches of 3, rate 1, "
        "seed 0, float64"
    )


def test_the_key_depends_on_the_versions_and_the_kernels(monkeypatch):
    made_by = tasks._makers()
    assert made_by["kernels"][-1] == "eager"
    for changed in ({"torch": "9.9"}, {"batchnorm": "9.9"}, {"kernels": ["other"]}):
        before = RUN.key
        monkeypatch.setattr(tasks, "_makers", lambda changed=changed: made_by | changed)
        assert RUN.key != before
