"""The commands for model files: what they write, what they say, and that they write whole files."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from models.exported import SHAPE, Net, batch_may_vary, net, onnx_bytes, program_bytes, tampered
from models.test_files import ATTACKS, pickled
from support import assert_close
from torch import nn
from typer.testing import CliRunner

import batchnorm as bn
from batchnorm import cli
from batchnorm.models import files
from batchnorm.models.programs.calibrating import statistics_of
from batchnorm.models.programs.running import outputs_of
from batchnorm.study.data import load

RUNNER = CliRunner()
SUFFIXES = (".pt2", ".onnx")


@pytest.fixture(autouse=True)
def _in_a_folder_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "net.pt2").write_bytes(program_bytes())
    (tmp_path / "net.onnx").write_bytes(onnx_bytes())


def run(*arguments):
    """Return what came of a command, whose output is no wider than a terminal."""
    shown = RUNNER.invoke(cli.app, [str(argument) for argument in arguments])
    lines = shown.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("Written: "))
    assert not shown.exception or isinstance(shown.exception, SystemExit), shown.exception
    return shown


def saved(model, path):
    torch.export.save(model, path)
    return path


class TestFold:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_what_is_written_gives_the_same_without_batch_norms(self, tmp_path, suffix):
        shown = run("fold", f"net{suffix}", "-o", f"out{suffix}")
        assert shown.exit_code == 0, shown.stderr
        assert re.search(r"bn +conv", shown.stdout)
        assert "3 folded, 0 left; verified: largest error" in shown.stdout
        written, x = files.read(tmp_path / f"out{suffix}"), torch.randn(7, *SHAPE)
        assert not statistics_of(written)
        (y,) = torch.utils._pytree.tree_leaves(outputs_of(written, (x,)))
        assert_close(y, net()(x), torch.float32, scale=100)
        assert shown.stderr == ""

    def test_its_own_loader_reads_it(self, tmp_path):
        assert run("fold", "net.pt2", "-o", "out.pt2").exit_code == 0
        y = torch.export.load(tmp_path / "out.pt2").module()(torch.randn(3, *SHAPE))
        assert y.shape == (3, 10)
        assert run("fold", "net.onnx", "-o", "out.onnx").exit_code == 0
        onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_compared_on_data(self, suffix):
        shown = run("fold", f"net{suffix}", "-o", f"out{suffix}", "--data", "digits")
        assert shown.exit_code == 0, shown.stderr

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_what_cannot_be_within_the_error_is_not_written(self, tmp_path, suffix):
        shown = run("fold", f"net{suffix}", "-o", f"out{suffix}", "--tol", "1e-12")
        assert shown.exit_code == 1
        assert shown.stderr.startswith("batchnorm: ")
        assert "the largest allowed: nothing is written; --tol allows more" in shown.stderr
        assert "the largest error is" in " ".join(shown.stdout.split())
        assert {path.name for path in tmp_path.iterdir()} == {"net.pt2", "net.onnx"}

    def test_a_file_that_differs_is_not_written(self, tmp_path, monkeypatch):
        """One that was damaged, say, between the folding and the disk."""
        real = files.read

        def damaged(path, **options):
            found = real(path, **options)
            if path.name != "net.pt2":
                with torch.no_grad():
                    found.state_dict["fc.bias"] += 1
            return found

        monkeypatch.setattr(files, "read", damaged)
        shown = run("fold", "net.pt2", "-o", "out.pt2")
        assert shown.exit_code == 1
        assert re.search(r"out.pt2: its largest error is .*, over 1.0e-04", shown.stderr)
        assert {path.name for path in tmp_path.iterdir()} == {"net.pt2", "net.onnx"}

    def test_what_is_left_has_its_reason(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
        saved(batch_may_vary(nn.Sequential(model, nn.ReLU()).eval()), tmp_path / "some.pt2")
        shown = run("fold", "some.pt2", "-o", "out.pt2")
        assert shown.exit_code == 0
        assert re.search(r"0\.3 +it normalizes what relu returns", shown.stdout)
        assert "1 folded, 1 left" in shown.stdout

    def test_nothing_that_could_be_folded(self, tmp_path):
        model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(1), nn.ReLU()).eval()
        saved(batch_may_vary(model), tmp_path / "some.pt2")
        shown = run("fold", "some.pt2", "-o", "out.pt2")
        assert shown.exit_code == 1
        assert "some.pt2: nothing could be folded, and nothing is written" in shown.stderr
        assert not (tmp_path / "out.pt2").exists()

    def test_what_else_was_saved_stays(self, tmp_path):
        with (tmp_path / "more.pt2").open("wb") as file:
            torch.export.save(batch_may_vary(net()), file, extra_files={"classes": "0 to 9"})
        assert run("fold", "more.pt2", "-o", "out.pt2").exit_code == 0
        found = {"classes": ""}
        torch.export.load(tmp_path / "out.pt2", extra_files=found)
        assert found == {"classes": "0 to 9"}


class TestCalibrate:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_what_is_written_has_the_statistics_of_the_data(self, tmp_path, suffix):
        module, x = net(), torch.from_numpy(load("digits").train_inputs)
        bn.calibrate(module, x.split(100))
        shown = run("calibrate", f"net{suffix}", "digits", "-o", f"o{suffix}", "--batch-size", 100)
        assert shown.exit_code == 0, shown.stderr
        assert re.search(r"body\.2 +51,732 .* → .* → ", shown.stdout)
        assert "3 calibrated, 0 left; 15 batches" in shown.stdout
        found = statistics_of(files.read(tmp_path / f"o{suffix}"))
        for name, (mean, var) in found.items():
            layer = module.get_submodule(name)
            assert_close(mean, layer.running_mean, torch.float32, "sum", 4)
            assert_close(var, layer.running_var, torch.float32, "sum", 4)
        assert len(found) == 3

    @pytest.mark.parametrize("name", ["x.npy", "inputs.npz", "one.npz", "both.npz", "npz:both.npz"])
    def test_data_of_all_forms(self, tmp_path, name):
        x = np.random.default_rng(0).normal(size=(20, *SHAPE)).astype(np.float32)
        np.save("x.npy", x)
        np.savez("inputs.npz", x=x, other=np.zeros(3))
        np.savez("one.npz", pictures=x)
        np.savez("both.npz", x=x, y=np.arange(20) % 2)
        shown = run("calibrate", "net.pt2", name, "-o", "out.pt2")
        assert shown.exit_code == 0, shown.stderr
        values = 20 if name != "npz:both.npz" else 16  # a fifth is for the test
        assert re.search(rf"last +{values} ", shown.stdout)

    def test_features(self, tmp_path):
        np.savez("table.npz", x=np.random.default_rng(0).normal(size=(20, 3)), y=np.arange(20) % 2)
        made = torch.export.export(
            nn.Sequential(nn.BatchNorm1d(3)).eval(),
            (torch.randn(2, 3),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        saved(made, tmp_path / "features.pt2")
        for data in ("table.npz", "npz:table.npz"):
            shown = run("calibrate", "features.pt2", data, "-o", "out.pt2")
            assert shown.exit_code == 0, shown.stderr

    def test_a_fixed_number_of_examples(self, tmp_path):
        (tmp_path / "two.pt2").write_bytes(program_bytes(dynamic=False))
        np.save("x.npy", np.zeros((7, *SHAPE), np.float32))
        shown = run("calibrate", "two.pt2", "x.npy", "-o", "out.pt2", "--max-batches", 2)
        assert shown.exit_code == 0, shown.stderr
        assert "2 batches; the last 1 examples make no batch" in shown.stdout

    def test_nothing_that_could_be_calibrated(self, tmp_path):
        np.save("x.npy", np.ones((1, 3), np.float32))
        model = nn.Sequential(nn.BatchNorm1d(3)).eval()
        saved(torch.export.export(model, (torch.randn(1, 3),)), tmp_path / "one.pt2")
        shown = run("calibrate", "one.pt2", "x.npy", "-o", "out.pt2")
        assert shown.exit_code == 1
        assert "it saw one value a channel" in " ".join(shown.stdout.split())
        assert "nothing could be calibrated, and nothing is written" in shown.stderr
        assert not (tmp_path / "out.pt2").exists()

    def test_a_file_that_differs_is_not_written(self, tmp_path, monkeypatch):
        real = files.read

        def damaged(path, **options):
            found = real(path, **options)
            if path.name != "net.pt2":
                found.state_dict["bn.running_mean"] += 1
            return found

        monkeypatch.setattr(files, "read", damaged)
        shown = run("calibrate", "net.pt2", "digits", "-o", "out.pt2")
        assert shown.exit_code == 1
        assert "out.pt2: the file has other statistics: nothing is written" in shown.stderr
        assert not (tmp_path / "out.pt2").exists()


class TestMemory:
    def test_what_a_training_step_would_keep(self):
        shown = run("memory", "net.pt2", "--batch-size", 16)
        assert shown.exit_code == 0, shown.stderr
        module, example = net().train(), (torch.randn(16, *SHAPE),)
        expected = bn.memory_report(module, example).total
        (total,) = re.findall(r"^total +(.*)$", shown.stdout, re.MULTILINE)
        assert total.split() == " ".join(f"{v / 1e3:.4g} kB" for v in expected.values()).split()

    def test_an_onnx_file_has_none(self):
        shown = run("memory", "net.onnx")
        assert shown.exit_code == 2
        assert "net.onnx: an ONNX file has no backward pass" in shown.stderr


def bad_files(folder):
    """Make files that are no good."""
    (folder / "torn.pt2").write_bytes(program_bytes()[:3000])
    (folder / "text.pt2").write_text("a diary\n")
    (folder / "text.onnx").write_text("a diary\n")
    (folder / "text.npy").write_text("a diary\n")
    (folder / "net.txt").write_text("a diary\n")
    (folder / "pickle.pt2").write_bytes(pickled(folder / "marker"))
    np.save(folder / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.save(folder / "flat.npy", np.zeros((5, 64), np.float32))
    np.savez(folder / "two.npz", a=np.zeros(3), b=np.zeros(3))
    saved(batch_may_vary(Net().train()), folder / "training.pt2")
    saved(batch_may_vary(nn.ReLU()), folder / "none.pt2")


class TestBadInput:
    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ("fold no.pt2 -o out.pt2", "no.pt2: No such file or directory"),
            ("fold no.onnx -o out.onnx", "no.onnx: No such file or directory"),
            ("fold . -o out.pt2", ".: expected a name that ends in .pt2"),
            ("fold net.txt -o out.txt", "net.txt: expected a name that ends in .pt2"),
            ("fold net.pt2 -o out.onnx", "--out out.onnx: expected a .pt2 file"),
            ("fold net.pt2 -o no/out.pt2", "--out no/out.pt2: no is no folder"),
            ("fold torn.pt2 -o out.pt2", "torn.pt2: RuntimeError"),
            ("fold text.pt2 -o out.pt2", "text.pt2: RuntimeError"),
            ("fold text.onnx -o out.onnx", "text.onnx: "),
            ("fold pickle.pt2 -o out.pt2", "pickle.pt2: "),
            ("fold training.pt2 -o out.pt2", "was exported in training mode"),
            ("fold none.pt2 -o out.pt2", "none.pt2: it has no batch norm"),
            ("fold net.pt2 -o out.pt2 --data flat.npy", "got shape (5, 64), expected (N, 1, 8, 8)"),
            ("fold net.pt2 -o out.pt2 --data digit", "digit: got unknown data, expected FILE.npy"),
            ("calibrate net.pt2 no.npy -o out.pt2", "no.npy: got no such file"),
            ("calibrate net.pt2 text.npy -o out.pt2", "text.npy: got the error"),
            ("calibrate net.pt2 objects.npy -o out.pt2", "objects.npy: got the error"),
            ("calibrate net.pt2 two.npz -o out.pt2", "two.npz: got a, b, expected an array"),
            ("calibrate net.pt2 mnist:no -o out.pt2", "no: got no such path"),
            (
                "calibrate net.pt2 flat.npy -o out.pt2",
                "flat.npy: got shape (5, 64), expected (N, 1",
            ),
            ("calibrate training.pt2 digits -o out.pt2", "was exported in training"),
            ("calibrate none.pt2 digits -o out.pt2", "none.pt2: it has no batch norm"),
            ("memory none.pt2", "none.pt2: it has no batch norm"),
            ("memory net.onnx", "net.onnx: an ONNX file has no backward pass"),
        ],
    )
    def test_gives_one_line_and_status_2(self, tmp_path, command, said):
        bad_files(tmp_path)
        before = {path.name for path in tmp_path.iterdir()}
        shown = run(*command.split())
        assert shown.exit_code == 2, shown.output
        assert shown.stdout == ""
        assert shown.stderr.count("\n") == 1
        assert shown.stderr.startswith("batchnorm: ")
        assert said in shown.stderr
        assert {path.name for path in tmp_path.iterdir()} == before  # no marker either

    @pytest.mark.parametrize("attack", ["a pickled weight", "a guard", "a library"])
    @pytest.mark.parametrize("command", ["fold", "calibrate", "memory"])
    def test_an_untrusted_file_runs_no_code(self, tmp_path, attack, command):
        marker, change = tmp_path / "marker", ATTACKS[attack][0]
        content = tampered(lambda records, program: change(records, program, marker))
        (tmp_path / "bad.pt2").write_bytes(content)
        rest = {"fold": "-o out.pt2", "calibrate": "digits -o out.pt2", "memory": ""}[command]
        shown = run(command, "bad.pt2", *rest.split())
        assert shown.exit_code == 2
        assert shown.stderr.count("\n") == 1
        assert not marker.exists()

    def test_a_usage_error_has_status_2(self):
        assert run("fold", "net.pt2").exit_code == 2
        assert run("calibrate", "net.pt2", "digits").exit_code == 2
        assert run("memory", "net.pt2", "--batch-size", "0").exit_code == 2

    @pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
    def test_what_is_not_installed_is_said(self, monkeypatch, missing):
        monkeypatch.setitem(sys.modules, missing, None)
        shown = run("calibrate", "net.onnx", "digits", "-o", "out.onnx")
        assert shown.exit_code == 2
        assert (
            shown.stderr
            == f'batchnorm: {missing} is not installed: pip install "batchnorm[export]"\n'
        )


def test_help_says_what_the_commands_do():
    for verb in ("fold", "calibrate", "memory"):
        shown = run(verb, "--help")
        assert shown.exit_code == 0
        assert "No code in" in " ".join(shown.stdout.split())


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_no_file(tmp_path):
    program = """import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
import time
from batchnorm.models import files
from batchnorm.cli import main

real = files.read
def read(path, **options):
    if path.name != "net.pt2":
        print("at work", flush=True)
        time.sleep(60)
    return real(path, **options)

files.read = read
main()
"""
    command = [sys.executable, "-c", program, "fold", "net.pt2", "-o", "out.pt2"]
    fold = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert fold.stdout.readline() == "at work\n"
    assert len(list(tmp_path.iterdir())) == 3  # half of it is there, under another name
    time.sleep(0.2)
    os.killpg(fold.pid, signal.SIGINT)
    _, error = fold.communicate()
    assert fold.returncode == 130
    assert error == "batchnorm: stopped; nothing is written\n"
    assert {path.name for path in tmp_path.iterdir()} == {"net.pt2", "net.onnx"}
