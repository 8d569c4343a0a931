"""What the callbacks of frameworks share, in a training loop of our own."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.models.schedule import Schedule

ACCUMULATE, STEPS = 4, 3


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), bn.BatchNorm1d(6, activation="relu"),
        nn.Linear(6, 1),
    )  # fmt: skip


def optimizer_of(model):
    """Return one that moves a weight without a gradient of this step, if it is given any."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def data(steps=STEPS):
    torch.manual_seed(2)
    return [list((torch.randn(32, 3) * 2 + 1).split(8)) for _ in range(steps)]


def train(model, schedule, steps=STEPS, skipped=(), before=0):
    optimizer = optimizer_of(model)
    schedule.begin(model, before)
    for at, micro_batches in enumerate(data(steps), before + 1):
        optimizer.zero_grad(set_to_none=False)
        for micro_batch in micro_batches:
            model.train()
            schedule.open()
            (model(micro_batch).square().mean() / ACCUMULATE).backward()
            model.eval()
        if at not in skipped:
            optimizer.step()
        schedule.step(at, taken=at not in skipped)
    return model


def by_hand(steps=STEPS, skipped=()):
    model = network()
    optimizer = optimizer_of(model)
    for at, micro_batches in enumerate(data(steps), 1):
        optimizer.zero_grad()
        with bn.transaction(model) as step:
            for micro_batch in micro_batches:
                (model(micro_batch).square().mean() / ACCUMULATE).backward()
            if at in skipped:
                step.rollback()
        if at not in skipped:
            optimizer.step()
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def affine_and_statistics(model):
    return {n: v for n, v in state(model).items() if n.startswith(("1.", "2."))}


def assert_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_in_no_transaction(model):
    assert type(model[1]) is nn.BatchNorm1d
    assert "ledger" not in model[1].__dict__
    assert model[2].ledger is None


class TestTransactions:
    def test_statistics_move_once_a_step(self):
        model = train(network(), Schedule(transactions=True))
        assert model[1].num_batches_tracked == model[2].num_batches_tracked == STEPS
        assert_bits(state(model), state(by_hand()))
        assert_in_no_transaction(model)

    def test_a_step_that_was_skipped_leaves_them(self):
        model = train(network(), Schedule(transactions=True), skipped=[1, 3])
        assert model[1].num_batches_tracked == STEPS - 2
        assert_bits(state(model), state(by_hand(skipped=[1, 3])))

    def test_are_open_only_within_a_step(self):
        model, schedule = network(), Schedule(transactions=True)
        schedule.begin(model, 0)
        assert_in_no_transaction(model)
        schedule.open()
        ledger = model[1].ledger
        schedule.open()
        assert model[1].ledger is ledger is not None
        schedule.step(1)
        assert_in_no_transaction(model)

    def test_only_where_asked_for(self):
        plain = train(network(), Schedule())
        assert plain[1].num_batches_tracked == STEPS * ACCUMULATE
        model = train(network(), Schedule(transactions=True, where="2"))
        assert [model[at].num_batches_tracked for at in (1, 2)] == [STEPS * ACCUMULATE, STEPS]
        assert_bits(model[1].running_mean, plain[1].running_mean)

    def test_what_belongs_to_no_step_is_forgotten(self):
        model, schedule = network(), Schedule(transactions=True)
        schedule.begin(model, 0)
        before = state(model)
        schedule.open()
        model(data()[0][0])
        schedule.end([])
        assert_in_no_transaction(model)
        assert_bits(state(model), before)

    def test_a_run_that_was_cut_off_is_rolled_back_by_the_next(self):
        model = network()
        cut_off = Schedule(transactions=True)
        cut_off.begin(model, 0)
        cut_off.open()
        model(data()[0][0])
        train(model, Schedule(transactions=True))
        assert_bits(state(model), state(by_hand()))
        assert_in_no_transaction(model)
        cut_off.step(1)  # has nothing to decide any more
        assert_bits(state(model), state(by_hand()))

    def test_one_of_the_user_is_left_to_the_user(self):
        model, schedule = network(), Schedule(transactions=True)
        with bn.transaction(model):
            schedule.begin(model, 0)
            with pytest.raises(RuntimeError, match="'1' is in a transaction already"):
                schedule.open()
            model(data()[0][0])
            schedule.abandon()
        assert model[1].num_batches_tracked == 1

    def test_a_commit_that_fails_leaves_none(self):
        model, schedule = network(), Schedule(transactions=True)
        schedule.begin(model, 0)
        schedule.open()
        model(data()[0][0])
        model[2].momentum = model[2].num_batches_tracked = None
        with pytest.raises(ValueError, match="momentum"):
            schedule.step(1)
        assert_in_no_transaction(model)


class TestFreezing:
    @pytest.mark.parametrize("transactions", [False, True])
    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_nothing_moves_after_so_many_steps(self, after, transactions):
        options = {"transactions": transactions}
        expected = train(network(), Schedule(**options), steps=after)
        model = train(network(), Schedule(freeze_after=after, **options), steps=after + 3)
        assert_bits(affine_and_statistics(model), affine_and_statistics(expected))
        assert not torch.equal(model[0].weight, expected[0].weight)
        assert not any(p.requires_grad for at in (1, 2) for p in model[at].parameters())
        assert model[2].ledger is None
        bn.unfreeze(model)
        assert type(model[1]) is nn.BatchNorm1d
        assert model[1].weight.requires_grad

    def test_a_run_that_goes_on_is_frozen_from_its_start(self):
        model = network()
        before = affine_and_statistics(model)
        train(model, Schedule(freeze_after=2), before=2)
        assert_bits(affine_and_statistics(model), before)

    def test_another_run_is_not_frozen_by_the_one_before(self):
        schedule = Schedule(freeze_after=STEPS, transactions=True)
        train(network(), schedule)
        other = train(network(), schedule, steps=STEPS - 1)
        assert_bits(state(other), state(by_hand(STEPS - 1)))

    def test_only_where_asked_for(self):
        model = train(network(), Schedule(freeze_after=1, where="2"))
        assert [model[at].num_batches_tracked for at in (1, 2)] == [
            STEPS * ACCUMULATE,
            ACCUMULATE,
        ]


class TestCalibration:
    def calibrated(self, batches, **options):
        """Return a model after `end`, its schedule, and a copy of it from before."""
        model, schedule = network(), Schedule(calibrate=batches)
        train(model, schedule)
        before = copy.deepcopy(model)
        schedule.end((batch for step in data() for batch in step), **options)
        return model, schedule, before

    @pytest.mark.parametrize(
        ("batches", "options", "expected"),
        [
            (True, {}, 12),
            (5, {}, 5),
            (100, {}, 12),
            (True, {"most": 7}, 7),
            (5, {"most": 7}, 5),
            (7, {"most": 5}, 5),
        ],
    )
    def test_statistics_are_those_of_the_batches(self, batches, options, expected):
        model, schedule, by_hand = self.calibrated(batches, **options)
        taken = [batch for step in data() for batch in step][:expected]
        assert schedule.report.batches == expected
        assert model[1].num_batches_tracked == expected
        hidden = torch.cat(taken) @ model[0].weight.T
        torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
        torch.testing.assert_close(model[1].running_var, hidden.var(0))
        bn.calibrate(by_hand, taken)
        assert_bits(state(model), state(by_hand))

    def test_only_once_and_only_if_asked_for(self):
        model, schedule, _ = self.calibrated(True)
        before = state(model)
        schedule.end([torch.randn(8, 3)])
        assert_bits(state(model), before)
        plain = Schedule()
        train(model, plain, steps=0)
        plain.end([torch.randn(8, 3)])
        assert_bits(state(model), before)
        assert plain.report is None

    def test_of_a_run_that_never_began_is_none(self):
        schedule = Schedule(calibrate=True)
        schedule.end([torch.randn(8, 3)])
        assert schedule.report is None

    def test_calls_the_model_as_it_is_told(self):
        model = network()
        schedule = Schedule(calibrate=True, call=lambda model, batch: model(batch["x"]), where="1")
        schedule.begin(model, 0)
        schedule.end([{"x": torch.ones(4, 3), "y": 0}])
        torch.testing.assert_close(model[1].running_mean, model[0].weight.sum(1))
        assert model[2].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibrate": 0}, "calibrate is 0: expected True, False, or the most batches"),
        ({"calibrate": -1}, "calibrate is -1"),
        ({"freeze_after": -1}, "freeze_after is -1: expected a number of optimizer steps"),
        ({"calibrate": True, "freeze_after": 5}, "give one of them, or two callbacks"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


def test_a_name_of_no_layer_is_an_error_from_the_start():
    with pytest.raises(ValueError, match=r"where has 'body\.\*'"):
        Schedule(where="body.*").begin(network(), 0)
