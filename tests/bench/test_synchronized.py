"""The model of what synchronization costs: by hand, and as the page shows it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from batchnorm.bench.errors import WrongResult

ROOT = Path(__file__).parents[2]
US = 1e-6


@pytest.fixture
def script(monkeypatch):
    """The module, as processes that it starts can import it, too."""
    monkeypatch.syspath_prepend(ROOT)
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return importlib.import_module("benchmarks.synchronized")


@pytest.fixture
def model(script):
    """The model that it prints."""
    return importlib.import_module("benchmarks.collectives")


def test_bytes_are_those_of_the_collectives(model):
    assert model.row_bytes(256) == 8 * (1 + 256 + 256)
    assert model.sums_bytes(256) == 8 * (256 + 256)


def test_times_are_latencies_and_bytes(model):
    cluster = model.Cluster(model.Link(1 * US, 1e9), model.Link(10 * US, 1e8), 8, 100 * US)
    row = 1000  # 1 us inside a node, 10 us between
    inside, between = 1 * US, 10 * US
    for gather in model.GATHERS.values():
        assert gather(cluster, 2, row) == pytest.approx(100 * US + 1 * US + 1 * inside)
    assert model.gather_by_ring(cluster, 4, row) == pytest.approx(100 * US + 3 * US + 3 * inside)
    assert model.gather_by_tree(cluster, 4, row) == pytest.approx(100 * US + 2 * US + 3 * inside)
    assert model.gather_by_nodes(cluster, 5, row) == pytest.approx(100 * US + 3 * US + 4 * inside)
    # 4 nodes of 8: three hops of the ring leave a node, and its bytes go by the slowest link
    assert model.gather_by_ring(cluster, 32, row) == pytest.approx(
        100 * US + 3 * 10 * US + 28 * US + 31 * between
    )
    assert model.gather_by_tree(cluster, 32, row) == pytest.approx(
        100 * US + 5 * 10 * US + 31 * between
    )
    assert model.gather_by_nodes(cluster, 32, row) == pytest.approx(
        100 * US + 2 * 10 * US + 3 * between + 3 * US + 7 * 4 * inside
    )
    assert model.sum_by_ring(cluster, 4, row) == pytest.approx(100 * US + 6 * US + 1.5 * inside)
    assert model.sum_by_tree(cluster, 4, row) == pytest.approx(100 * US + 4 * US + 4 * inside)
    assert model.sum_by_ring(cluster, 32, row) == pytest.approx(
        100 * US + 2 * (3 * 10 * US + 28 * US) + 2 * 31 / 32 * between
    )
    assert model.sum_by_nodes(cluster, 32, row) == pytest.approx(
        100 * US + 6 * (1 * US + inside) + 4 * (10 * US + between)
    )


def test_a_layer_waits_for_the_fastest_way(model):
    one, other = model.row_bytes(8), model.sums_bytes(8)
    for p in (2, 16, 1000):
        best = min(f(model.GPUS, p, one) for f in model.GATHERS.values())
        best += min(f(model.GPUS, p, other) for f in model.SUMS.values())
        assert model.wait(model.GPUS, p, 8) == pytest.approx(best)


def test_two_sums_pay_from_the_crossing_on(model):
    at = model.crossing(model.GPUS, 256)
    for p, pays in ((2, False), (at - 1, False), (at, True)):
        times = (f(model.GPUS, p, 256) for f in (model.wait_by_two_sums, model.wait))
        assert (next(times) < next(times)) == pays


def test_a_resnet_has_its_layers(model):
    channels = list(model.resnet50())
    assert (len(channels), sum(channels)) == (53, 26_560)


def test_the_standard_error_is_that_of_samples(model):
    means = torch.randn(4000, 98).mean(1)
    assert model.standard_error(49, 2) == pytest.approx(float(means.std()), rel=0.05)


def test_the_page_shows_what_is_printed(script, tmp_path, capsys):
    figure = tmp_path / "figure.svg"
    script.main(["--figure", str(figure)])
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "synchronized.md").read_text(encoding="utf-8")
    for table in printed.split("\n\n")[:2]:
        assert table in page
    crossing = f"from {script.crossing(script.GPUS, script.CHANNELS):,} processes on"
    assert crossing in printed
    assert crossing in page
    assert figure.read_text(encoding="utf-8") == script.svg()
    assert "</svg>" in script.FIGURE.read_text(encoding="utf-8")


def test_the_layer_is_timed_over_processes(script, capsys):
    times = script.measure(sizes=(2,), rounds=3)
    assert list(times) == [(2, "8x256x7x7"), (2, "8x64x56x56")]
    for each in times.values():
        assert list(each) == ["local", "synchronized"]
        assert [len(rounds) for rounds in each.values()] == [3, 3]
        assert min(map(min, each.values())) > 0
    script.show(times | {(99, "1x2"): {"local": [1e-6] * 3, "synchronized": [3e-6] * 3}})
    printed = capsys.readouterr().out
    assert "3 (3–3)" in printed
    assert "they compete" in printed


def test_nothing_wrong_is_timed(script, monkeypatch):
    monkeypatch.setattr(script, "TOLERANCE", -1)
    with pytest.raises(WrongResult, match="y is off by"):
        script._step(0, (2, 3, 4, 4), None)
