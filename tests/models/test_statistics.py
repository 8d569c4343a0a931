"""Running statistics of several places as one. On real processes: see tests/ranks."""

import copy
from functools import partial

import pytest
import torch
from models import gathering
from models.gathering import Recording
from models.holding import buffers_of
from support import assert_close
from torch import nn

import batchnorm as bn

PARTS = [5, 2, 60, 33]


def data():
    return torch.randn(100, 3, dtype=torch.float64) * 3 + torch.arange(100)[:, None] / 10


def calibrated(x, norm=bn.BatchNorm1d):
    layer = norm(3).double()
    bn.calibrate(layer, x)
    return layer


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), bn.BatchNorm(4, momentum=None))


class TestMerge:
    def test_it_is_the_statistics_of_the_concatenated_data(self):
        x = data()
        states = [(calibrated(part).state_dict(), len(part)) for part in x.split(PARTS)]
        merged = bn.merge_statistics(states)
        assert_close(merged["running_mean"], x.mean(0), torch.float64, "sum")
        assert_close(merged["running_var"], x.var(0), torch.float64, "sum")
        assert merged["num_batches_tracked"] == 4
        assert list(merged) == ["running_mean", "running_var", "num_batches_tracked"]
        averaged = sum(state["running_var"] * n for state, n in states) / 100
        assert (averaged < 0.9 * x.var(0)).all()  # which loses what lies between the parts

    def test_by_hand(self):
        state = {"running_mean": torch.tensor([4.0]), "running_var": torch.tensor([2.0])}
        other = {"running_mean": torch.tensor([13.0]), "running_var": torch.tensor([166 / 3])}
        merged = bn.merge_statistics([(state, 2), (other, 4)])  # 3, 5 and 8, 9, 11, 24
        assert merged["running_mean"].tolist() == [10]
        assert merged["running_var"].item() == pytest.approx(276 / 5)
        assert "num_batches_tracked" not in merged

    @pytest.mark.parametrize("order", [1, -1])
    def test_neither_the_order_nor_a_grouping_matters(self, order):
        x = data()
        parts = [(calibrated(part).state_dict(), len(part)) for part in x.split(PARTS)][::order]
        at_once = bn.merge_statistics(parts)
        halves = [
            (bn.merge_statistics(half), sum(n for _, n in half)) for half in (parts[:2], parts[2:])
        ]
        for name, value in bn.merge_statistics(halves).items():
            assert_close(value, at_once[name], torch.float64, "sum")

    def test_a_round_of_federated_training(self):
        clients = [network() for _ in range(3)]
        shares = torch.randn(90, 3).split([10, 30, 50])
        for client, share in zip(clients, shares, strict=True):
            for part in share.split(10):
                client(part + len(share))
        states = [client.state_dict() for client in clients]
        server = network()
        averaged = {
            k: sum(s[k] * len(x) / 90 for s, x in zip(states, shares, strict=True))
            for k in server.state_dict()
        }
        merged = bn.merge_statistics(zip(states, (10, 30, 50), strict=True))
        assert {key.rsplit(".")[-1] for key in averaged.keys() - merged.keys()} == {
            "weight",
            "bias",
        }
        averaged.update(merged)
        server.load_state_dict(averaged)
        assert server[1].num_batches_tracked == 1 + 3 + 5
        assert (server[1].running_var > states[0]["1.running_var"]).all()

    def test_types_are_those_of_the_first_and_sums_are_not(self):
        mean = torch.tensor([1000.0], dtype=torch.float16)
        half = {"running_mean": mean, "running_var": torch.ones(1, dtype=torch.float16)}
        merged = bn.merge_statistics([(half, 10**6)] * 50)  # whose sums no half could hold
        assert (merged["running_mean"].dtype, merged["running_mean"].item()) == (
            torch.float16,
            1000,
        )
        assert merged["running_var"].item() == pytest.approx(1)

    def test_what_counts_nothing_is_left_out(self):
        one, other = (calibrated(part).state_dict() for part in data().split(50))
        merged = bn.merge_statistics([(other, 0), (one, 50)])
        for name in ("running_mean", "running_var"):
            assert_close(merged[name], one[name], torch.float64)

    def test_a_model_without_any_has_nothing_to_merge(self):
        assert bn.merge_statistics([(nn.Linear(3, 3).state_dict(), 10)]) == {}

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ([], "no state dicts to merge"),
            ([({}, 0)], "or all of them count 0"),
            ([(network().state_dict(), 1)], "state dict 0 counts 1: expected .* 2 or more"),
            ([(network().state_dict(), 5), (network().state_dict(), -3)], "state dict 1 counts -3"),
            ([(network().state_dict(), float("nan"))], "counts nan"),
            (
                [(network().state_dict(), 5), (nn.Linear(3, 4).state_dict(), 5)],
                r"'1\.running_mean' is of size \(4,\) in the first .* dict 1 has nothing",
            ),
            (
                [(nn.Linear(3, 4).state_dict(), 5), (network().state_dict(), 5)],
                r"state dict 1 has '1\.running_mean', and the first has not",
            ),
            (
                [(nn.BatchNorm1d(3).state_dict(), 5), (nn.BatchNorm1d(4).state_dict(), 5)],
                r"'running_mean' is of size \(3,\) .* has size \(4,\): expected .* one model",
            ),
            ([({"running_mean": torch.zeros(3)}, 5)], "'running_var' is of size .* has nothing"),
        ],
    )
    def test_what_cannot_be_is_an_error(self, parts, message):
        with pytest.raises(ValueError, match=message):
            bn.merge_statistics(parts)


@pytest.fixture
def over_processes(monkeypatch):
    return partial(gathering.over_processes, monkeypatch)


class TestReduce:
    def test_it_is_the_mixture_of_all_by_their_batches(self, over_processes):
        models = [bn.BatchNorm1d(3, momentum=None).double() for _ in range(3)]
        batches = data()[:96].reshape(6, 16, 3)
        for model, own in zip(models, batches.split([1, 2, 3]), strict=True):
            for batch in own:
                model(batch)
        means, shares = batches.mean(1), torch.tensor([1, 2, 3], dtype=torch.float64) / 6
        between = torch.stack([model.running_mean for model in models]) - means.mean(0)
        expected = batches.var(1).mean(0) + shares @ between.square()
        report = over_processes(bn.reduce_statistics, models)
        assert report.done == [""]
        assert_close(models[0].running_mean, means.mean(0), torch.float64, "sum")
        assert_close(models[0].running_var, expected, torch.float64, "sum")
        assert models[0].num_batches_tracked == 1

    def test_one_class_a_process_by_hand(self, over_processes):
        models = [bn.BatchNorm1d(1) for _ in range(2)]
        for model, mean in zip(models, (-3.0, 3.0), strict=True):
            model.running_mean.fill_(mean)
        report = over_processes(bn.reduce_statistics, models)
        assert models[0].running_mean.item() == 0
        assert models[0].running_var.item() == 10  # 1 within, 9 between
        assert report.spread == pytest.approx(3 / 10**0.5)

    def test_processes_that_saw_nothing_count_nothing(self, over_processes):
        models = [network() for _ in range(3)]
        for _ in range(2):
            models[1](torch.randn(8, 3))
        over_processes(bn.reduce_statistics, models)
        for mine, truth in zip(models[0][1:], models[1][1:], strict=True):
            torch.testing.assert_close(mine.running_mean, truth.running_mean)
            torch.testing.assert_close(mine.running_var, truth.running_var)

    def test_where_nobody_counted_all_count_the_same(self, over_processes):
        models = [bn.BatchNorm1d(1) for _ in range(4)]
        for at, model in enumerate(models):
            model.running_mean.fill_(float(at))
            model.num_batches_tracked = None
        over_processes(bn.reduce_statistics, models)
        assert models[0].running_mean.item() == 1.5
        assert models[0].running_var.item() == 2.25

    def test_all_layers_go_in_two_collectives(self, over_processes):
        model, recording = network(), Recording()
        over_processes(bn.reduce_statistics, [model])
        bn.reduce_statistics(model, recording)
        assert [len(row) for row in recording.rows] == [1, 2 * (1 + 4 + 4)]

    def test_where_and_layers_without_statistics(self, over_processes):
        models = [nn.Sequential(network(), nn.BatchNorm1d(3, track_running_stats=False))] * 2
        assert over_processes(bn.reduce_statistics, models).done == ["0.1", "0.2"]
        assert over_processes(bn.reduce_statistics, models, where="0.2").done == ["0.2"]

    def test_alone_nothing_happens(self):
        model = network()
        before = buffers_of(model)
        report = bn.reduce_statistics(model)
        assert report.left == dict.fromkeys(["1", "2"], "there is no other process")
        torch.testing.assert_close(buffers_of(model), before, rtol=0, atol=0)
        bn.assert_statistics_agree(model)


class TestAgree:
    @pytest.mark.parametrize(
        ("ranks", "statistic", "message"),
        [
            ([2], "running_mean", "the running mean of '2' on rank 2 is not that of rank 0"),
            ([1, 3], "running_var", "the running variance of '2' on ranks 1, 3 is not"),
        ],
    )
    def test_the_error_names_layer_and_ranks(self, over_processes, ranks, statistic, message):
        models = [network() for _ in range(4)]
        over_processes(bn.assert_statistics_agree, models)
        for rank in ranks:
            values = models[rank][2].get_buffer(statistic)
            values[1] = torch.nextafter(values[1], torch.tensor(2.0))  # one bit
        with pytest.raises(RuntimeError, match=message):
            over_processes(bn.assert_statistics_agree, models)

    def test_statistics_that_are_nan_everywhere_agree(self, over_processes):
        models = [network() for _ in range(2)]
        for model in models:
            model[1].running_mean.fill_(float("nan"))
        over_processes(bn.assert_statistics_agree, models)
        models[1][1].running_mean.zero_()
        with pytest.raises(RuntimeError, match="'1' on rank 1"):
            over_processes(bn.assert_statistics_agree, models)

    def test_reduced_statistics_agree(self, over_processes):
        models = [network() for _ in range(3)]
        for model in models:
            model(torch.randn(8, 3))
        found = []
        for rank in range(3):
            turned = [copy.deepcopy(m) for m in (*models[rank:], *models[:rank])]
            over_processes(bn.reduce_statistics, turned)
            found.append(buffers_of(turned[0]))
        torch.testing.assert_close(found, [found[0]] * 3)
