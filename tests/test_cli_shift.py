"""The commands shift and adapt: what they find and write, and what they say, to whom."""

import functools
import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diagnose.test_programs import NAMES, exported
from models.exported import SHAPE, batch_may_vary, net, tampered, trained
from models.test_files import ATTACKS
from support import assert_close
from test_cli_models import bad_files, run, saved
from torch import nn

import batchnorm as bn
from batchnorm.cli.shift import _plain
from batchnorm.cli.shift_page import page
from batchnorm.models import files
from batchnorm.models.programs.calibrating import statistics_of
from batchnorm.study.data import load
from batchnorm.study.shifts import shift

SUFFIXES = (".pt2", ".onnx")


def module():
    """Return the small network, which remembers the digits."""
    made = net()
    bn.calibrate(made, torch.from_numpy(load("digits").train_inputs))
    return made


@functools.cache
def content(kind):
    """Return the file that it is in."""
    file = io.BytesIO()
    {"pt2": torch.export.save, "onnx": onnx.save}[kind](exported(kind, module()), file)
    return file.getvalue()


def blurred(inputs):
    return torch.from_numpy(shift(inputs, "blur", 3, low=0, high=inputs.max()))


@pytest.fixture(autouse=True)
def _in_a_folder_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for kind in ("pt2", "onnx"):
        (tmp_path / f"net.{kind}").write_bytes(content(kind))


def said(shown):
    return " ".join(shown.stdout.split())


class TestShift:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_data_as_in_training(self, suffix):
        shown = run("shift", f"net{suffix}", "digits", "--fail-on", "shift")
        assert shown.exit_code == 0, shown.stderr
        assert shown.stderr == ""
        assert re.search(r"body\.2 .* \d of 4", shown.stdout)
        assert "No shift: score" in said(shown)
        assert "360 examples." in said(shown)  # the held-out ones
        assert "1. " not in shown.stdout

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_data_that_have_shifted(self, suffix):
        expected = bn.measure_shift(module(), blurred(load("digits").test_inputs).split(64))
        shown = run("shift", f"net{suffix}", "digits", "--shift", "blur:3")
        assert shown.exit_code == 0, shown.stderr
        assert f"Shift of the inputs: score {expected.score:.3g} nats" in said(shown)
        assert "it begins at bn, and" in said(shown)
        assert re.search(r"bn .* < 0.001 .* shifted", shown.stdout)
        worst = expected.channels[0]
        assert re.search(rf"{worst.layer} +{worst.channel} +.* sd +×", shown.stdout)
        assert "1. Check how the data are prepared" in said(shown)

    def test_a_shift_can_be_a_failure(self):
        shown = run("shift", "net.pt2", "digits", "--shift", "blur:3", "--fail-on", "shift")
        assert shown.exit_code == 1
        assert shown.stderr == "batchnorm: net.pt2: the data have shifted, and --fail-on says so\n"
        assert "Shift of the inputs" in shown.stdout

    @pytest.mark.parametrize("name", ["x.npy", "x.npz", "npz:both.npz"])
    def test_data_of_all_forms(self, name):
        x = np.random.default_rng(0).normal(size=(50, *SHAPE)).astype(np.float32)
        np.save("x.npy", x)
        np.savez("x.npz", x=x, other=np.zeros(3))
        np.savez("both.npz", x=x, y=np.arange(50) % 2)
        shown = run("shift", "net.pt2", name, "--batch-size", 20, "--max-batches", 2)
        assert shown.exit_code == 0, shown.stderr
        assert f"{40 if name != 'npz:both.npz' else 10} examples" in said(shown)
        assert run("shift", "net.pt2", name, "--shift", "noise:5").exit_code == 0

    def test_features(self, tmp_path):
        rows = [f"{a},{b},{c},{k % 2}" for k, (a, b, c) in enumerate(torch.randn(50, 3).tolist())]
        Path("table.csv").write_text("\n".join(["a,b,c,label", *rows]))
        batch = torch.export.Dim("batch")
        layer = nn.Sequential(nn.BatchNorm1d(3)).eval()
        made = torch.export.export(layer, (torch.randn(2, 3),), dynamic_shapes=({0: batch},))
        saved(made, tmp_path / "features.pt2")
        shown = run("shift", "features.pt2", "csv:table.csv")
        assert shown.exit_code == 0, shown.stderr
        assert "10 examples" in said(shown)

    def test_what_was_the_batch_of_training(self):
        found = [
            run("shift", "net.pt2", "digits", "--json", "-", "--train-batch-size", size)
            for size in (8, 512)
        ]
        few, many = (json.loads(shown.stdout)["noise"] for shown in found)
        assert few > many

    def test_a_fixed_number_of_examples(self, tmp_path):
        saved(torch.export.export(module(), (torch.randn(7, *SHAPE),)), tmp_path / "seven.pt2")
        shown = run("shift", "seven.pt2", "digits")
        assert "357 examples; the last 3 examples make no batch." in said(shown)

    def test_of_many_layers_those_that_moved_most(self, tmp_path):
        layers = [nn.Sequential(nn.BatchNorm2d(1), nn.ReLU()) for _ in range(20)]
        saved(batch_may_vary(trained(nn.Sequential(*layers))), tmp_path / "deep.pt2")
        shown = run("shift", "deep.pt2", "digits")
        assert len(re.findall(r"^\d+\.0 .* of 1", shown.stdout, re.MULTILINE)) == 12
        assert "and 8 more, which moved less" in shown.stdout

    def test_what_is_left_has_its_reason(self, tmp_path):
        model = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False))
        saved(batch_may_vary(model.eval()), tmp_path / "some.pt2")
        shown = run("shift", "some.pt2", "digits")
        assert re.search(r"it has no running statistics$", shown.stdout, re.MULTILINE)


class TestJson:
    @pytest.mark.parametrize("where", ["-", "out.json"])
    def test_has_all_numbers(self, where):
        shown = run("shift", "net.pt2", "digits", "--shift", "blur:3", "--json", where)
        text = shown.stdout if where == "-" else Path(where).read_text()
        expected = bn.measure_shift(module(), blurred(load("digits").test_inputs).split(64))
        found = json.loads(text)
        assert found["kind"] == "input"
        assert found["score"] == pytest.approx(expected.score, rel=1e-3)
        assert list(found["layers"]) == NAMES
        assert len(found["channels"]) == 18
        assert found.keys() == expected.to_dict().keys()
        assert "Shift of the inputs" in (shown.stderr if where == "-" else shown.stdout)

    def test_is_valid_whatever_the_numbers_are(self):
        found = bn.measure_shift(module(), torch.randn(20, *SHAPE))
        odd = [found.channels[0]._replace(ratio=math.inf, mean=math.nan)] * 200
        plain = _plain(replace(found, channels=odd, score=math.inf))
        assert plain["score"] is plain["channels"][0]["mean"] is None
        assert len(plain["channels"]) == 100
        json.dumps(plain, allow_nan=False)


class TestPage:
    def test_is_there_and_needs_nothing_else(self):
        shown = run("shift", "net.pt2", "digits", "--shift", "blur:3", "--html", "out.html")
        assert shown.exit_code == 0, shown.stderr
        assert "Written: out.html" in shown.stdout
        text = Path("out.html").read_text(encoding="utf-8")
        assert text.count("<svg ") == text.count("</svg>") == text.count("<h1>") == 1
        assert "Shift of the inputs" in text
        assert "Check how the data are prepared" in text
        assert "<code>batchnorm adapt MODEL DATA -o OUT</code>" in text
        assert "digits, blur:3, seen by net.pt2" in text
        assert all(f"<td>{name}</td>" in text for name in NAMES)
        assert not re.search(r"<script|<link|@import|src=|url\((?!#)", text)
        assert set(re.findall(r'href="(.)', text)) <= {"#"}

    def test_no_shift_needs_nothing_to_be_done(self):
        text = page(bn.measure_shift(module(), torch.randn(2, *SHAPE)), "net.pt2", "x.npy")
        assert "<h1>No shift</h1>" in text
        assert "What to do" not in text

    def test_hostile_names_are_text(self):
        names = ["<script>alert(1)</script>", r"$\frac{$", "a$b$c \x1b[2J", "--><b>", "]]>"]
        found = bn.measure_shift(module(), torch.randn(20, *SHAPE) + 1)
        layers = dict.fromkeys(names, found.layers["bn"])
        channels = [found.channels[0]._replace(layer=name) for name in names]
        text = page(
            replace(found, layers=layers, channels=channels, left={"<i>": "<u>"}), "<a>", "<p>\x07"
        )
        assert not re.search(r"<script|<b>|<i>|<u>|<a>|<p>\\x07|\x1b|\x07", text)
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert r"a$b$c \x1b[2J" in text

    def test_is_written_whole_or_not_at_all(self, tmp_path, monkeypatch):
        before = {path.name for path in tmp_path.iterdir()}
        real = Path.write_text

        def full(path, *args, **options):
            real(path, "half of it")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        shown = run("shift", "net.pt2", "digits", "--html", "out.html")
        assert shown.exit_code == 2
        assert shown.stderr == (
            "batchnorm: --html out.html: No space left on device; name another file\n"
        )
        assert {path.name for path in tmp_path.iterdir()} == before


class TestAdapt:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_what_is_written_is_adapted(self, tmp_path, suffix):
        made, x = module(), blurred(load("digits").train_inputs)
        expected = bn.adapt(made, x.split(64))
        shown = run("adapt", f"net{suffix}", "digits", "--shift", "blur:3", "-o", f"out{suffix}")
        assert shown.exit_code == 0, shown.stderr
        assert f"bn {expected.weights['bn']:>15.1%}" in shown.stdout
        assert "3 adapted, 0 left; shift" in said(shown)
        assert "1,437 examples" in said(shown)
        for name, (mean, var) in statistics_of(files.read(tmp_path / f"out{suffix}")).items():
            layer = made.get_submodule(name)
            assert_close(mean, layer.running_mean, torch.float32, "sum", 10)
            assert_close(var, layer.running_var, torch.float32, "sum", 10)
        again = run("shift", f"out{suffix}", "digits", "--shift", "blur:3", "--fail-on", "shift")
        assert again.exit_code == 0, again.stdout

    def test_a_prior_that_knows_better(self, tmp_path):
        shown = run("adapt", "net.pt2", "digits", "-o", "out.pt2", "--prior", 1e12)
        assert shown.exit_code == 0
        assert "there was no shift to adapt to" in said(shown)
        found = statistics_of(files.read(tmp_path / "out.pt2"))
        for name, (mean, _) in found.items():
            assert_close(mean, module().get_submodule(name).running_mean, torch.float32, scale=10)
        assert run("adapt", "net.pt2", "digits", "-o", "out.pt2", "--prior", -1).exit_code == 2

    def test_nothing_that_could_be_adapted(self, tmp_path):
        np.save("x.npy", np.float16([[1000] * 3, [-1000] * 3] * 10))
        batch = torch.export.Dim("batch")
        layer, x = nn.Sequential(nn.BatchNorm1d(3)).half().eval(), torch.randn(2, 3).half()
        saved(
            torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)), tmp_path / "small.pt2"
        )
        shown = run("adapt", "small.pt2", "x.npy", "-o", "out.pt2", "--prior", 0)
        assert shown.exit_code == 1
        assert "its variance does not fit float16" in said(shown)
        assert "nothing could be adapted, and nothing is written" in shown.stderr
        assert not (tmp_path / "out.pt2").exists()

    def test_a_file_that_differs_is_not_written(self, tmp_path, monkeypatch):
        real = files.read

        def damaged(path, **options):
            found = real(path, **options)
            if path.name != "net.pt2":
                found.state_dict["bn.running_mean"] += 1
            return found

        monkeypatch.setattr(files, "read", damaged)
        shown = run("adapt", "net.pt2", "digits", "-o", "out.pt2")
        assert shown.exit_code == 1
        assert "out.pt2: the file has other statistics: nothing is written" in shown.stderr
        assert not (tmp_path / "out.pt2").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ("shift no.pt2 digits", "no.pt2: No such file or directory"),
            ("shift text.pt2 digits", "text.pt2: RuntimeError"),
            ("shift pickle.pt2 digits", "pickle.pt2: "),
            ("shift net.pt2 digit", "digit: got unknown data, expected FILE.npy"),
            ("shift net.pt2 flat.npy", "flat.npy: got shape (5, 64), expected (N, 1, 8, 8)"),
            ("shift net.pt2 objects.npy", "objects.npy: got the error"),
            ("shift none.pt2 digits", "none.pt2: it has no batch norm, and a folded one remembers"),
            ("shift training.pt2 digits", "was exported in training"),
            ("shift net.pt2 digits --shift fog:3", "--shift fog:3: got no such shift, expected"),
            ("shift net.pt2 digits --shift blur:9", "--shift blur:9: got no such shift"),
            ("shift net.pt2 digits --shift blur", "--shift blur: got no such shift"),
            ("shift net.pt2 one.npy", "net.pt2: no batch norm says anything of these data"),
            ("shift net.pt2 digits --html no/x.html", "--html no/x.html: no is no folder"),
            ("shift net.pt2 digits --json .", "--json .: is a folder"),
            ("shift net.pt2 digits --json net.pt2", "--json net.pt2: is a file that the command"),
            ("shift net.pt2 digits --html x --json ./x", "--json x: is a file that the command"),
            ("adapt net.pt2 no.npy -o out.pt2", "no.npy: got no such file"),
            ("adapt net.pt2 digits -o out.onnx", "--out out.onnx: expected a .pt2 file"),
            ("adapt none.pt2 digits -o out.pt2", "none.pt2: it has no batch norm, and a folded"),
        ],
    )
    def test_gives_one_line_and_status_2(self, tmp_path, command, said):
        bad_files(tmp_path)
        np.save("one.npy", np.zeros((1, *SHAPE), np.float32))
        before = {path.name for path in tmp_path.iterdir()}
        shown = run(*command.split())
        assert shown.exit_code == 2, shown.output
        assert shown.stdout == ""
        assert shown.stderr.count("\n") == 1
        assert shown.stderr.startswith("batchnorm: ")
        assert said in shown.stderr
        assert {path.name for path in tmp_path.iterdir()} == before

    def test_a_shift_of_what_is_no_picture(self, tmp_path):
        batch = torch.export.Dim("batch")
        layer = nn.Sequential(nn.BatchNorm1d(3)).eval()
        made = torch.export.export(layer, (torch.randn(2, 3),), dynamic_shapes=({0: batch},))
        saved(made, tmp_path / "features.pt2")
        np.save("x.npy", np.zeros((5, 3), np.float32))
        shown = run("shift", "features.pt2", "x.npy", "--shift", "noise:1")
        assert shown.exit_code == 2
        assert "--shift noise:1: got data of shape (5, 3), expected pictures" in shown.stderr

    @pytest.mark.parametrize("attack", ["a pickled weight", "a guard", "a library"])
    @pytest.mark.parametrize("command", ["shift bad.pt2 digits", "adapt bad.pt2 digits -o o.pt2"])
    def test_an_untrusted_file_runs_no_code(self, tmp_path, attack, command):
        marker, change = tmp_path / "marker", ATTACKS[attack][0]
        content = tampered(lambda records, program: change(records, program, marker))
        (tmp_path / "bad.pt2").write_bytes(content)
        shown = run(*command.split())
        assert shown.exit_code == 2
        assert shown.stderr.count("\n") == 1
        assert not marker.exists()

    def test_a_usage_error_has_status_2(self):
        assert run("shift", "net.pt2").exit_code == 2
        assert run("shift", "net.pt2", "digits", "--fail-on", "rain").exit_code == 2
        assert run("adapt", "net.pt2", "digits").exit_code == 2

    @pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
    def test_what_is_not_installed_is_said(self, monkeypatch, missing):
        monkeypatch.setitem(sys.modules, missing, None)
        shown = run("shift", "net.onnx", "digits")
        assert shown.exit_code == 2
        assert (
            shown.stderr
            == f'batchnorm: {missing} is not installed: pip install "batchnorm[export]"\n'
        )

    def test_a_node_whose_name_steers_a_terminal(self, tmp_path):
        model = exported("onnx", module())
        for node in model.graph.node:
            if node.op_type == "BatchNormalization":
                for at, name in enumerate(node.input):
                    node.input[at] = name.replace("bn.running", "bn\x1b[2J.running")
        for tensor in model.graph.initializer:
            tensor.name = tensor.name.replace("bn.running", "bn\x1b[2J.running")
        onnx.save(model, tmp_path / "odd.onnx")
        shown = run("shift", "odd.onnx", "digits", "--html", "out.html")
        assert shown.exit_code == 0, shown.stderr
        assert r"bn\x1b[2J" in shown.stdout
        assert "\x1b[2J" not in shown.stdout + Path("out.html").read_text()


def test_help_says_what_the_commands_do():
    for verb in ("shift", "adapt"):
        shown = run(verb, "--help")
        assert shown.exit_code == 0
        assert "No code in" in said(shown)
