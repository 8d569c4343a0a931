"""Batches: how models are called, what is moved, the bar on a terminal, what is given back."""

import io
import sys
from collections import UserDict
from contextlib import redirect_stderr

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.models.batches import Buffers, Modes, call_with, limited, progress_bar, uncompiled


class Called(nn.Module):
    """A model on the meta device, which keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.register_buffer("there", torch.empty(1, device="meta"))

    def forward(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return "output"


class Moving:
    """Something with a method `to`, as what tokenizers return."""

    device = None

    def to(self, device):
        new = Moving()
        new.device = device
        return new


X, META = torch.ones(2, 3), torch.device("meta")


@pytest.mark.parametrize("batch", [X, (X, 1), [X, X], (X,)], ids=lambda b: type(b).__name__)
def test_the_first_element_is_the_input(batch):
    model = Called()
    assert call_with(model, batch, None) == "output"
    assert [x.device for x in model.args] == [META]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_is_passed_as_keywords(kind):
    model = Called()
    call_with(model, kind(x=X, name="n"), None)
    assert model.args == ()
    assert model.kwargs["name"] == "n"
    assert kind is UserDict or model.kwargs["x"].device == META


def test_call_gets_the_batch_as_it_is_but_moved():
    seen = {}

    def call(model, batch):
        seen.update(batch)
        return model

    model = Called()
    assert call_with(model, {"a": [X, "text"], "b": Moving(), "c": 3}, call) is model
    assert seen["a"][0].device == seen["b"].device == META
    assert (seen["a"][1], seen["c"]) == ("text", 3)


def test_packed_sequences_stay_what_they_are():
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    model = nn.LSTM(2, 2)
    output, _ = call_with(model, {"x": packed}, lambda model, batch: model(batch["x"]))
    assert output.batch_sizes.tolist() == [2, 1, 1]


def test_a_model_without_tensors_moves_nothing():
    seen = []
    call_with(nn.Identity(), [Moving()], lambda model, batch: seen.append(batch[0].device))
    assert seen == [None]


@pytest.mark.parametrize("batch", ["text", 3, None, [], ["text"], [None]])
def test_what_is_no_batch_is_an_error_with_the_way_out(batch):
    with pytest.raises(TypeError, match=r"a batch is a \w+: expected .* call=lambda model, batch"):
        call_with(nn.Identity(), batch, None)


def test_a_tensor_is_one_batch_and_the_limit_holds():
    assert [part.shape for part in limited(X, None)] == [(2, 3)]
    assert list(limited(range(5), 3)) == [0, 1, 2]
    assert list(limited(range(2), 3)) == [0, 1]


class Screen(io.StringIO):
    """What the bar is written to."""

    def __init__(self, is_terminal=True):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


class TestProgress:
    @pytest.fixture(autouse=True)
    def _terminal(self, monkeypatch):
        pytest.importorskip("rich")
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")

    def calibrate(self, screen, data=(X, X), **options):
        with redirect_stderr(screen):
            bn.calibrate(bn.BatchNorm(3), data, **options)
        return screen.getvalue()

    def test_a_bar_on_a_terminal_that_is_gone_afterwards(self, capsys):
        shown = self.calibrate(Screen())
        last = shown.rindex("calibrating")
        assert "100%" in shown
        assert shown.rindex("\x1b[2K") > last  # the line is erased
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
        assert capsys.readouterr().out == ""

    def test_it_is_gone_after_an_error_too(self):
        screen = Screen()
        with pytest.raises(TypeError, match="a batch is a str"):
            self.calibrate(screen, ["text"])
        shown = screen.getvalue()
        assert shown.rindex("\x1b[2K") > shown.rindex("calibrating")

    def test_none_where_there_is_no_terminal_none_is_wanted_or_rich_is_missing(self, monkeypatch):
        assert self.calibrate(Screen(is_terminal=False)) == ""
        assert self.calibrate(Screen(), progress=False) == ""
        monkeypatch.setitem(sys.modules, "rich.progress", None)
        assert self.calibrate(Screen()) == ""

    @pytest.mark.parametrize(
        ("data", "most", "passes", "total"),
        [
            ([X] * 4, None, 1, 4),
            ([X] * 4, 3, 2, 6),
            ([X] * 2, 9, 1, 2),
            (iter([X]), 3, 3, 9),
            (iter([X]), None, 3, None),
        ],
    )
    def test_it_knows_how_much_there_is(self, monkeypatch, data, most, passes, total):
        import rich.progress

        added = []

        def add_task(self, description, total):
            added.append((description, total))
            return 0

        monkeypatch.setattr(rich.progress.Progress, "add_task", add_task)
        monkeypatch.setattr(rich.progress.Progress, "advance", lambda self, task: None)
        with redirect_stderr(Screen()), progress_bar("at work", data, most, passes, True) as step:
            step()
        assert added == [("at work", total)]


def test_modes_are_given_back_module_by_module():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout()), nn.ReLU())
    model[1].eval()
    modes = Modes(model)
    model.eval()
    modes.restore()
    assert [m.training for m in model.modules()] == [True, True, False, False, True]


def test_buffers_are_given_back_and_those_that_did_not_change_are_not_touched():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False))
    model[1].eval()
    leaf = torch.randn(8, 3, requires_grad=True)
    kept = model[1](leaf)  # autograd keeps its statistics
    buffers, tensors = Buffers(model), list(model.buffers())
    for _ in range(2):
        model(torch.randn(8, 3))
        model[1].running_var = torch.zeros(3)
        buffers.restore()
        assert model[0].num_batches_tracked == 0
        assert model[0].running_mean.tolist() == [0, 0, 0]
        assert all(a is b for a, b in zip(model.buffers(), tensors, strict=True))
    kept.square().sum().backward()


def test_uncompiled_runs_what_was_written():
    from torch._dynamo.testing import CompileCounter

    count = CompileCounter()
    layer = torch.compile(bn.BatchNorm(3), backend=count)
    with uncompiled():
        layer(torch.randn(8, 3))
    assert count.frame_count == 0
    layer(torch.randn(8, 3))
    assert count.frame_count == 1
