"""The command check: what it says of broken models and of healthy ones, and how it ends."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diagnose.test_check_programs import (
    digits,
    exported,
    healthy,
    nan_statistics,
    never_updated,
    norm_model,
)
from models.exported import SHAPE, tampered
from models.test_files import ATTACKS
from test_cli_models import RUNNER, bad_files, run, saved
from torch import nn

import batchnorm as bn
from batchnorm import cli
from batchnorm.cli.check_page import page
from batchnorm.cli.check_words import _TITLES, advice, meaning, verdict
from batchnorm.diagnose.check.finding import Finding

SUFFIXES = (".pt2", ".onnx")


def put(name, plant=None):
    """Write the file of the network, with something planted in it."""
    module = healthy()
    if plant is not None:
        plant(module)
    path = Path(name)
    kind = path.suffix.removeprefix(".")
    model = exported(kind, module)
    (torch.export if kind == "pt2" else onnx).save(model, path)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def said(shown):
    return " ".join(shown.stdout.split())


@pytest.mark.parametrize("suffix", SUFFIXES)
class TestWhatIsWrong:
    def test_nothing(self, suffix):
        put(f"net{suffix}")
        shown = run("check", f"net{suffix}", "digits", "--fail-on", "warning")
        assert shown.exit_code == 0, shown.stdout
        assert shown.stderr == ""
        assert shown.stdout.startswith("Healthy: 0 errors, 0 warnings, 0 notes in 3 batch norms")
        assert re.search(r"Of its answers \d\d\.\d% are right", said(shown))
        assert re.search(r"^body\.2 +0\.0\d+ *$", shown.stdout, re.MULTILINE)

    def test_statistics_that_were_never_updated(self, suffix):
        put(f"net{suffix}", never_updated)
        shown = run("check", f"net{suffix}", "digits", "--fail-on", "error")
        assert shown.exit_code == 1
        assert shown.stderr == (
            f"batchnorm: net{suffix}: eval_train_gap at body.2, and --fail-on says so\n"
        )
        assert shown.stdout.startswith("Not healthy: 2 errors")
        assert "The statistics were never taken from data" in shown.stdout
        assert "body.2 (never_updated)" in shown.stdout
        assert "running_mean is 0 and running_var 1" in said(shown)
        assert "why never_updated of 'body.2', see there" in said(shown)
        assert "to do `batchnorm calibrate MODEL DATA -o OUT`" in said(shown)
        assert re.search(r"^bn +0\.\d+ *$", shown.stdout, re.MULTILINE)
        assert re.search(r"^body\.2 +\S+  far *$", shown.stdout, re.MULTILINE)

    def test_what_it_says_is_the_remedy(self, suffix):
        put(f"net{suffix}", never_updated)
        assert run("calibrate", f"net{suffix}", "digits", "-o", f"out{suffix}").exit_code == 0
        shown = run("check", f"out{suffix}", "digits", "--fail-on", "warning")
        assert shown.exit_code == 0, shown.stdout

    def test_another_preparation(self, suffix):
        put(f"net{suffix}")
        np.save("x.npy", (digits()[0] * 255).numpy())
        shown = run("check", f"net{suffix}", "x.npy", "--fail-on", "warning")
        assert shown.exit_code == 1
        assert "bn (eval_train_gap)" in shown.stdout
        assert "standard deviations from its running statistics" in said(shown)
        assert "another preparation of the data" in said(shown)
        assert "Check how the data are prepared" in said(shown)
        assert "the range of the values (to 1, or to 255)" in said(shown)
        assert "answers" not in shown.stdout  # without labels

    def test_nan(self, suffix):
        put(f"net{suffix}", nan_statistics)
        shown = run("check", f"net{suffix}", "digits", "--fail-on", "error")
        assert shown.exit_code == 1
        assert "The statistics are no numbers" in shown.stdout
        assert "bn (non_finite_statistics)" in shown.stdout
        assert "running_var is NaN" in shown.stdout
        assert re.search(r"^bn +inf  far *$", shown.stdout, re.MULTILINE)


class TestOptions:
    def test_a_finding_is_no_failure_unless_that_is_asked_for(self):
        put("net.pt2", never_updated)
        assert run("check", "net.pt2", "digits").exit_code == 0

    def test_a_warning_is_no_error(self, tmp_path):
        module = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval()
        batch = torch.export.Dim("batch")
        made = torch.export.export(module, (torch.randn(2, 3),), dynamic_shapes=({0: batch},))
        saved(made, tmp_path / "net.pt2")
        np.save("x.npy", np.float32(np.random.default_rng(0).normal(size=(200, 3))))
        shown = run("check", "net.pt2", "x.npy", "--fail-on", "error")
        assert shown.exit_code == 0
        assert shown.stdout.startswith("Not quite healthy: 0 errors, 1 warning")
        assert "to do train it with track_running_stats=True, and export it again" in said(shown)
        assert run("check", "net.pt2", "x.npy", "--fail-on", "warning").exit_code == 1

    def test_calls(self):
        put("net.pt2")
        shown = run("check", "net.pt2", "digits", "--batch-size", 100, "--max-batches", 2)
        assert "over 2 batches." in said(shown)

    def test_a_fixed_number_of_examples(self, tmp_path):
        saved(torch.export.export(healthy(), (torch.randn(70, *SHAPE),)), tmp_path / "fixed.pt2")
        shown = run("check", "fixed.pt2", "digits")
        assert "over 20 batches; the last 37 examples make no batch." in said(shown)

    def test_of_many_layers_those_that_are_off_most(self):
        onnx.save(norm_model((2, 3), count=20), "deep.onnx")
        np.save("x.npy", np.float32(np.random.default_rng(0).normal(size=(200, 3))))
        shown = run("check", "deep.onnx", "x.npy")
        assert len(re.findall(r"^\d+ +\S+  far *$", shown.stdout, re.MULTILINE)) == 12
        assert "and 8 more, which are off less" in shown.stdout

    @pytest.mark.parametrize("where", ["-", "out.json"])
    def test_json(self, where):
        put("net.onnx", nan_statistics)
        shown = RUNNER.invoke(cli.app, ["check", "net.onnx", "digits", "--json", where])
        text = shown.stdout if where == "-" else Path(where).read_text()
        found = json.loads(text, parse_constant=pytest.fail)  # which NaN would be
        assert found["ok"] is False
        assert found["gaps"] == {"bn": None}
        assert found["findings"][0]["code"] == "eval_train_gap"
        assert found["findings"][0]["fix"] == "batchnorm calibrate MODEL DATA -o OUT"
        assert "Not healthy" in (shown.stderr if where == "-" else shown.stdout)


class TestPage:
    def test_is_there_and_needs_nothing_else(self):
        put("net.onnx", never_updated)
        shown = run("check", "net.onnx", "digits", "--html", "out.html")
        assert shown.exit_code == 0, shown.stderr
        assert "Written: out.html" in shown.stdout
        text = Path("out.html").read_text(encoding="utf-8")
        assert text.count("<svg ") == text.count("</svg>") == text.count("<h1>") == 1
        assert "<h1>Not healthy</h1>" in text
        assert "digits, seen by net.onnx: 2 errors" in text
        assert "<dd>body.2 (never_updated)</dd>" in text
        assert "<code>batchnorm calibrate MODEL DATA -o OUT</code>" in text
        assert all(f"<td>{name}</td>" in text for name in ("bn", "body.2", "last"))
        assert not re.search(r"<script|<link|@import|src=|url\((?!#)", text)
        assert set(re.findall(r'href="(.)', text)) <= {"#"}

    def test_what_is_healthy_needs_nothing_to_be_done(self):
        text = page(bn.check(bn.BatchNorm(3)), "net.pt2", "x.npy")
        assert "<h1>Healthy</h1>" in text
        assert "What was found" not in text
        assert "<svg" not in text

    def test_hostile_names_are_text(self):
        names = ["<script>alert(1)</script>", r"$\frac{$", "a$b$c \x1b[2J", "--><b>", "]]>"]
        report = bn.check(bn.BatchNorm(3), [torch.randn(64, 3) + 5])
        [finding, *_] = report.findings
        text = page(
            replace(
                report,
                gaps=dict.fromkeys(names, 1.0),
                findings=[replace(finding, layer=n, cause=n, evidence=n, fix=n) for n in names],
            ),
            "<a>",
            "<p>\x07",
        )
        assert not re.search(r"<script|<b>|<i>|<u>|<a>|<p>\\x07|\x1b|\x07", text)
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert r"a$b$c \x1b[2J" in text


class TestWords:
    def test_each_code_has_a_title(self):
        codes = set()
        for path in Path(bn.__file__).parent.glob("diagnose/check*/*.py"):
            codes |= set(re.findall(r'Finding\(\s*"(\w+)"', path.read_text(encoding="utf-8")))
        of_training = {
            "momentum_zero", "momentum_convention", "small_batch", "bias_before_norm",
            "trained_affine", "moving_statistics", "weight_decay", "copy_statistics",
            "ranks_disagree", "no_batch_norm",
        }  # fmt: skip
        assert len(codes) > 15
        assert codes - of_training <= set(_TITLES)

    def test_of_many_fixes_some(self):
        some = [Finding("eps_mismatch", "note", str(at), "", "", f"fix {at}") for at in range(5)]
        assert advice(some) == ("`fix 0`", "`fix 1`", "`fix 2`", "and 2 more like it")

    def test_a_note_is_no_fault(self):
        report = bn.check(bn.BatchNorm(3))
        assert (
            verdict(replace(report, findings=[Finding("x", "note", "", "", "", "")])) == "Healthy"
        )

    def test_what_was_not_looked_at_is_not_healthy(self):
        report = replace(bn.check(bn.BatchNorm(3)), layers=0)
        assert verdict(report) == "Not checked"
        assert meaning(report) == "None of the batch norms could be looked at."


class TestBadInput:
    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ("check no.pt2 digits", "no.pt2: No such file or directory"),
            ("check text.pt2 digits", "text.pt2: RuntimeError"),
            ("check text.onnx digits", "text.onnx: "),
            ("check pickle.pt2 digits", "pickle.pt2: "),
            ("check net.pt2 digit", "digit: got unknown data, expected FILE.npy"),
            ("check net.pt2 flat.npy", "flat.npy: got shape (5, 64), expected (N, 1, 8, 8)"),
            ("check none.pt2 digits", "none.pt2: it has no batch norm, and a folded one remembers"),
            ("check training.pt2 digits", "was exported in training"),
            ("check net.pt2 digits --html no/x.html", "--html no/x.html: no is no folder"),
            ("check net.pt2 digits --json .", "--json .: is a folder"),
        ],
    )
    def test_gives_one_line_and_status_2(self, tmp_path, command, said):
        put("net.pt2")
        bad_files(tmp_path)
        before = {path.name for path in tmp_path.iterdir()}
        shown = run(*command.split())
        assert shown.exit_code == 2, shown.output
        assert shown.stdout == ""
        assert shown.stderr.count("\n") == 1
        assert shown.stderr.startswith("batchnorm: ")
        assert said in shown.stderr
        assert {path.name for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("attack", ["a pickled weight", "a guard"])
    def test_an_untrusted_file_runs_no_code(self, tmp_path, attack):
        marker, change = tmp_path / "marker", ATTACKS[attack][0]
        content = tampered(lambda records, program: change(records, program, marker))
        (tmp_path / "bad.pt2").write_bytes(content)
        shown = run("check", "bad.pt2", "digits")
        assert shown.exit_code == 2
        assert shown.stderr.count("\n") == 1
        assert not marker.exists()

    def test_a_usage_error_has_status_2(self):
        assert run("check", "net.pt2").exit_code == 2
        assert run("check", "net.pt2", "digits", "--fail-on", "rain").exit_code == 2

    def test_a_node_whose_name_steers_a_terminal(self):
        model = norm_model((2, 3))
        for at, name in enumerate(model.graph.node[0].input):
            model.graph.node[0].input[at] = name.replace("0.running", "0\x1b[2J.running")
        for tensor in model.graph.initializer:
            tensor.name = tensor.name.replace("0.running", "0\x1b[2J.running")
        onnx.save(model, "odd.onnx")
        np.save("x.npy", np.float32(np.random.default_rng(0).normal(size=(200, 3)) + 9))
        shown = run("check", "odd.onnx", "x.npy", "--html", "out.html", "--fail-on", "error")
        assert shown.exit_code == 1
        assert r"0\x1b[2J" in shown.stdout
        assert "\x1b[2J" not in shown.stdout + shown.stderr + Path("out.html").read_text()

    @pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
    def test_what_is_not_installed_is_said(self, monkeypatch, missing):
        put("net.onnx")
        monkeypatch.setitem(sys.modules, missing, None)
        shown = run("check", "net.onnx", "digits")
        assert shown.exit_code == 2
        assert "pip install" in shown.stderr


def test_help_says_what_the_command_does():
    shown = run("check", "--help")
    assert shown.exit_code == 0
    assert "No code in" in said(shown)
