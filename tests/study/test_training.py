"""A run: its losses to the last digit, the same every time, and a result whatever happens."""

from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from study.small import small_data
from torch.nn.functional import cross_entropy

from batchnorm.study import tasks
from batchnorm.study.data import load
from batchnorm.study.networks import build
from batchnorm.study.training import Run, batches, next_evaluation, one_thread, step, train

DATA = small_data()
RUN = Run("digits", "sigmoid", "plain", learning_rate=1.0, seed=0, steps=6)


def losses(norm, data_set=DATA, **changes):
    return np.array(train(replace(RUN, norm=norm, **changes), data_set).losses)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # In float32 an operation rounds at 6e-8; a few hundred of them stand between two losses, and
    # every step hands its error on to the next one.
    [("float64", 1e-9), ("float32", 1e-4)],
)
def test_ours_gives_the_losses_of_torch_step_for_step(dtype, tolerance):
    theirs, ours = (
        losses(norm, load("digits"), dtype=dtype, steps=207) for norm in ("torch", "batchnorm")
    )
    assert len(theirs) == len(ours) == 207
    assert theirs[-1] < 0.2 < 2 < theirs[0]  # so that something was learned
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_ours_gives_the_losses_of_torch_in_the_convolutional_network():
    changes = {"dtype": "float64", "network": "conv", "steps": 40, "learning_rate": 0.3}
    theirs, ours = (losses(norm, **changes) for norm in ("torch", "batchnorm"))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert theirs[-1] < 0.5 * theirs[0]


def test_the_losses_are_those_of_gradient_descent():
    model = build("sigmoid", "plain", DATA.shape, 10, seed=0)
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
    np.testing.assert_allclose(losses("plain"), expected, rtol=1e-5)


def test_a_step_returns_the_loss_before_it():
    model = build("sigmoid", "plain", DATA.shape, 10, seed=0)
    x, y = next(batches(DATA, 60, 0))
    before = cross_entropy(model(x), y).item()
    assert step(model, x, y, 0.5) == pytest.approx(before, rel=1e-6)
    assert step(model, x, y, 0.5) < before


def test_accuracy_is_of_the_held_out_examples_in_evaluation():
    result = train(replace(RUN, norm="batchnorm", steps=80), DATA)
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


@pytest.mark.parametrize("field", asdict(RUN))
def test_the_key_depends_on_every_field(field):
    changed = {"norm": "torch", "network": "conv", "data": "mnist", "dtype": "float64"}
    other = replace(RUN, **{field: changed.get(field, 7)})
    assert other.key != RUN.key
    assert replace(RUN).key == RUN.key


def test_the_key_depends_on_the_versions_and_the_kernels(monkeypatch):
    made_by = tasks._makers()
    assert made_by["kernels"][-1] == "eager"
    for changed in ({"torch": "9.9"}, {"batchnorm": "9.9"}, {"kernels": ["other"]}):
        before = RUN.key
        monkeypatch.setattr(tasks, "_makers", lambda changed=changed: made_by | changed)
        assert RUN.key != before
