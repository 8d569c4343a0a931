"""The command of the bench on a GPU: what it writes, where, and how it ends."""

import json

import pytest
import torch
from bench.small_gpu import MODELS, ROWS, model_row
from torch import nn

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import clock, conduct, models
from benchmarks.gpu.contenders import Module
from benchmarks.gpu.rows import Row, read
from benchmarks.models.measure import Row as ModelRow
from benchmarks.models.ways import ACCELERATED, SAVING, STOCK, Way

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(clock, "copy_speed_of_cpu", lambda *_: 1e10)
    monkeypatch.setattr("benchmarks.gpu.cases.QUICK_SHAPES", ((512, 7, 7),))
    monkeypatch.setattr(models, "WAYS", (STOCK, ACCELERATED))


@pytest.fixture
def root(tmp_path):
    """Return a folder with files that have the marks, as the repository's own do."""
    (tmp_path / "docs").mkdir()
    for name, (begin, end) in {
        "README.md": (command.BEGIN, command.END),
        "docs/bench.md": command.FIGURES,
    }.items():
        assert begin in (command.ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(f"before\n\n{begin}\n\nold\n\n{end}\n\nafter\n")
    return tmp_path


class TestCommand:
    def test_a_quick_run_from_end_to_end(self, root, small, capsys):
        assert command.main(["--device", "cpu", "--peers", "jax"], root) == 0
        shown = capsys.readouterr().out
        assert "2x512x7x7 NHWC, bfloat16, relu, forward+backward: torch.nn" in shown
        assert "ResNet-50, small, accelerate:" in shown
        assert "| training step of ResNet-50, accelerated," in shown
        folder = root / "bench"
        ends = ("csv", "json", "png")
        names = [f"gpu-cpu{part}.{end}" for part in ("", "-models") for end in ends]
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
        found = read(folder / "gpu-cpu.csv", Row)
        assert {row.implementation for row in found} >= {"torch.nn", "batchnorm"}
        assert len(read(folder / "gpu-cpu-models.csv", ModelRow)) == 2
        made_on = json.loads((folder / "gpu-cpu.json").read_text())
        assert made_on["device"] == "cpu"
        assert made_on["copy_gb_per_s"]["median"] == 10
        assert "old" in (root / "README.md").read_text()
        # the same again has nothing left to do
        before = (folder / "gpu-cpu.csv").read_bytes()
        again = ["--device", "cpu", "--peers", "", "--resume"]
        assert command.main(again, root) == 0
        assert (folder / "gpu-cpu.csv").read_bytes() == before
        assert "torch.nn" not in capsys.readouterr().out.split("| forward + backward")[0]

    def test_it_stops_in_time_with_nothing_begun(self, root, small, capsys):
        assert command.main(["--device", "cpu", "--peers", "", "--minutes", "0"], root) == 0
        assert "The time was over" in capsys.readouterr().out
        assert not (root / "bench").exists()

    def test_without_a_gpu_it_says_what_to_do(self, root, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert command.main([], root) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "there is no GPU here that torch can use" in line
        assert "--device cpu" in line

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (["--peers", "numpy"], "--peers: got 'numpy'"),
            (["--dtypes", "int8"], "--dtypes: got 'int8'"),
            (["--out", "/proc/nothing"], "name another folder"),
            (["--tables"], "there are no results of a GPU"),
        ],
    )
    def test_what_cannot_be_had_is_said(self, given, words, root, capsys):
        assert command.main(["--device", "cpu", *given], root) == 2
        assert words in capsys.readouterr().err

    def test_the_tables_are_of_every_gpu_and_of_no_cpu(self, root):
        folder = root / command.RESULTS
        assert not command.write_tables(root)
        base = {"quick": False, "cuda": "13", "torch": "2", "triton": "3", "jax": "none"}
        one, other = ({**base, "device": "cuda", "gpu": name} for name in ("One", "Other"))
        conduct.save(folder, ROWS, one, b"", "gpu-one")
        conduct.save(folder, MODELS, one, b"", "gpu-one-models")
        conduct.save(folder, MODELS, other, b"", "gpu-other-models")
        for changes in ({"device": "cpu"}, {"quick": True}):
            made_on = {**one, "gpu": "none", **changes}
            conduct.save(folder, ROWS, made_on, b"", f"gpu-{next(iter(changes))}")
        assert command.write_tables(root)
        text = (root / "README.md").read_text()
        assert text.startswith("before")
        assert text.endswith("after\n")
        assert "old" not in text
        assert (text.count("**One**"), text.count("**Other**"), text.count("**none**")) == (1, 1, 0)
        assert "(benchmarks/results/gpu-one.png)" in text
        assert "One:\n\n| forward + backward |" in (root / "docs" / "bench.md").read_text()

    def test_a_failed_case_does_not_end_the_run(self, root, small, monkeypatch, capsys):
        def measure(case, *_):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(conduct, "measure", measure)
        arguments = ["--device", "cpu", "--peers", "", "--no-models"]
        assert command.main(arguments, root) == 1
        shown = capsys.readouterr().out
        assert shown.count("all is not timed: RuntimeError: out of memory") == 4

    def test_failed_models_do_not_end_the_run(self, root, small, monkeypatch, capsys):
        def loud(*_):
            raise RuntimeError("no convolution does this")

        arguments = ["--device", "cpu", "--no-layers"]
        monkeypatch.setattr(models, "pose", loud)
        assert command.main(arguments, root) == 1
        assert "all is not timed: RuntimeError: no convolution" in capsys.readouterr().out
        assert not (root / "bench").exists()

    def test_models_that_were_stopped_begin_again(self, root, small, monkeypatch, capsys):
        def measure(ways, *_):
            return models.Outcome([model_row(way) for way in ways[: len(asked) + 1]])

        asked = []
        monkeypatch.setattr(models, "WAYS", (STOCK, ACCELERATED, SAVING))
        monkeypatch.setattr(models, "measure", lambda *a: asked.append(1) or measure(*a))
        arguments = ["--device", "cpu", "--no-layers", "--resume"]
        for _ in range(3):
            assert command.main(arguments, root) == 0
        assert len(asked) == 2  # first without the last way, then with all
        assert capsys.readouterr().out.count("ResNet-50, accelerate, save_memory: 100.0 ms") == 1

    def test_ours_has_to_run(self, root, monkeypatch, capsys):
        absent = Module("batchnorm", lambda _: nn.Identity(), lambda _: "it is on holiday")
        monkeypatch.setattr(conduct, "OURS", absent)
        assert command.main(["--device", "cpu"], root) == 2
        assert "it is on holiday" in capsys.readouterr().err


class TestModels:
    def test_a_way_that_fails_or_is_wrong_is_left_out(self, monkeypatch):
        def changed(model, _):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 0.5
            return model

        ways = [STOCK, Way("wrong", changed), Way("loud", lambda *_: 1 / 0, is_ours=False)]
        found = models.measure(ways, CPU, 2, True, lambda: False)
        assert [row.way for row in found.rows] == ["stock"]
        assert "its losses in float64 are off by" in found.failed["wrong"]
        assert found.failed["loud"] == "ZeroDivisionError: division by zero"

    def test_fewer_images_are_taken_where_memory_does_not_suffice(self, monkeypatch):
        batches = []

        def limited(ways, posed, *_):
            batches.append(posed)
            if posed > 64:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return models.Outcome([model_row(STOCK, batch=64)])

        monkeypatch.setattr(models, "_measure", limited)
        monkeypatch.setattr(models, "pose", lambda network, device: network.batch)
        found = models.measure([STOCK], CPU, 2, False, lambda: False)
        assert batches == [256, 128, 64]
        assert list(found.too_large) == ["256 images", "128 images"]
        assert found.rows[0].batch == 64
