"""How batches are cut for a GPU, what is tuned and kept, where it runs, and how it is compiled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.launching import TRITON, WHERE_IT_RUNS, step, twice
from support import LAYOUTS

import batchnorm as bn
from batchnorm.kernels import Form, triton
from batchnorm.kernels.triton import device, launches, plan, tuning
from batchnorm.kernels.triton.plan import Cut

pytestmark = WHERE_IT_RUNS


def test_more_groups_than_can_be_counted_are_refused():
    x = torch.empty(2**20, 4096, device="meta")
    batch = [plan.batch_of(tuple(x.shape), x.stride(), 1, size) for size in (None, 2, 2**12)]
    assert [found is None for found in batch] == [False, True, False]


def test_what_was_tuned_for_another_gpu_is_not_used(cache, monkeypatch):
    x = torch.randn(40, 6, 9)
    batch = launches.seen(x, Form())
    own = launches.cut_of(batch, x, "forward")
    for wrong in (Cut(16, 16, 64, 1, True), Cut(3, 16, 1, 1), Cut(8, 16, 1, 1, True)):
        tuning.table(x.device)["any"] = wrong  # or else nobody asks
        monkeypatch.setattr(tuning, "kept", lambda *_, wrong=wrong: wrong)
        assert launches.cut_of(batch, x, "forward") == own


def test_what_reaches_over_31_bits_is_far():
    near, far = (torch.empty(n, 2, device="meta") for n in (2**29, 2**30))
    assert [plan.is_far(near, None), plan.is_far(near, far)] == [False, True]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 4])
def test_a_cut_covers_the_batch_and_can_be_launched(layout, size):
    shape, channel_dim, memory_format = LAYOUTS[layout]
    for scale in (1, 8, 300):
        shape_ = (shape[0] * scale, *shape[1:])
        strides = torch.empty(shape_, device="meta").to(memory_format=memory_format).stride()
        batch = plan.batch_of(shape_, strides, channel_dim, None)
        own = [plan.reckoned(batch, size, 132, held) for held in (0, plan.HELD)]
        for cut in [*own, *plan.candidates(batch, size, 132, plan.HELD)]:
            for n in (cut.rows, cut.columns, cut.warps):
                assert n >= 1
                assert n & (n - 1) == 0
            assert cut.rows * cut.columns >= 32 * cut.warps or cut.warps == 1
            if cut.held:
                assert cut.rows * cut.programs >= batch.most
                assert cut.columns >= batch.width or not batch.view.planar
                assert cut.programs <= 132


@pytest.mark.parametrize(
    ("shape", "held"),
    [((128, 512, 7, 7), True), ((256, 512, 7, 7), False), ((512, 64), True), ((4096, 64), False)],
)
def test_what_fits_in_the_registers_of_a_program_is_held(shape, held):
    batch = plan.batch_of(shape, torch.empty(shape, device="meta").stride(), 1, None)
    assert plan.reckoned(batch, 2, 132, plan.HELD).held == held


def test_bytes_are_loaded_sixteen_at_a_time_where_they_can_be():
    assert [plan.alignment(64, 3136), plan.alignment(196, 12), plan.alignment(49, 49)] == [8, 4, 1]
    assert plan.alignment(0, 64) == 8  # a step of nothing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


def test_what_was_tuned_is_kept_and_used(cache, monkeypatch):
    x, dy = torch.randn(40, 6, 9), torch.randn(40, 6, 9)
    before = step(x, dy)
    assert not cache.exists()  # nothing is tuned that nobody asked for
    monkeypatch.setenv("BATCHNORM_TUNE", "1")
    monkeypatch.setattr(launches, "start", twice if device.is_interpreted() else device.start)
    tuned = step(x, dy)
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    assert sorted(key.split(",")[0] for key in kept) == ["backward", "forward"]
    other = [1, 16, 6, 1, False]
    file.write_text(json.dumps(dict.fromkeys(kept, other)))
    tuning.forget()
    monkeypatch.delenv("BATCHNORM_TUNE")
    batch = launches.seen(x, Form())
    assert launches.cut_of(batch, x, "forward") == Cut(*other)
    again = step(x, dy)
    for one, two, three in zip(before[:1], tuned[:1], again[:1], strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": [1, 2]}', '{"key": ["a", 1, 1, 1, 0]}'])
def test_a_file_that_cannot_be_read_is_as_good_as_none(text, cache, monkeypatch):
    x = torch.randn(40, 6, 9)
    cache.mkdir()
    tuning._file(x.device).write_text(text)
    assert TRITON.forward(x, None, None, None, None, Form(), None).y.isfinite().all()


def test_a_candidate_that_does_not_run_is_passed_over(cache):
    good, bad = Cut(16, 16, 1, 1), Cut(16, 16, 2, 1)

    def run(cut):
        if cut == bad:
            raise RuntimeError("out of resources")

    assert tuning.fastest("key", torch.device("cpu"), [good, bad], run) == good
    with pytest.raises(RuntimeError, match="out of resources"):
        tuning.fastest("other", torch.device("cpu"), [bad, good], run)


def test_says_why_it_cannot_serve(monkeypatch):
    x = torch.zeros(4, 3)
    assert "does not take torch.int32" in TRITON.supports(x.int(), Form())
    strided = torch.zeros(4, 6, 8, 9)[:, ::2, ::2, ::3]
    assert "contiguous" in TRITON.supports(strided, Form())
    front = torch.zeros(3, 8, 5).transpose(0, 1)
    assert "outermost" in TRITON.supports(front, Form(ghost_size=2))
    assert "meta" in TRITON.supports(x.to("meta"), Form())
    monkeypatch.setattr(device, "is_interpreted", lambda: False)
    missing = device.missing.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in missing()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    device.refusal.cache_clear()
    assert missing() == "Old GPU has compute capability 7.5, and Triton needs 8.0 or more"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = type("Properties", (), {"gcnArchName": "gfx1100"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device.refusal.cache_clear()
    assert missing() == "Old GPU is gfx1100, and gfx9 is needed"
    device.refusal.cache_clear()
    monkeypatch.setattr(device, "VERSION", (99, 0))
    assert "99.0 is needed" in missing()
    monkeypatch.setattr(device, "import_module", lambda _: 1 / 0)
    assert missing() == "Triton cannot be imported: division by zero"
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _: None)
    assert "Triton is not installed" in missing()


def test_without_triton_the_package_is_whole():
    program = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.modules["triton"] = None
import batchnorm as bn, torch
from batchnorm.kernels.triton import device
assert bn.BatchNorm(3)(torch.randn(4, 3)).shape == (4, 3)
from batchnorm.cli import main
sys.argv = ["batchnorm", "env"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "triton: Triton is not installed" in done.stdout or "triton: there is no GPU" in (
        done.stdout
    )


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_every_program_compiles_ahead_of_time(target):
    """Of a thread's registers none is spilled in the loops that count; loads are 16 bytes wide."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("ahead.py"), target],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["program"] for row in rows} == {
        "collect", "normalize", "reduce_grad", "apply_grad", "forward", "backward", "follow",
    }  # fmt: skip
    if target.startswith("cuda"):
        for row in rows:
            assert row["registers"] <= device.REGISTERS
            assert row["spilled"] <= 512
            assert row["shared"] <= 99 * 1024  # what the smallest GPUs give a program
            if row["case"] in ("planar, bf16", "interleaved, bf16"):
                assert row["program"] == "follow" or row["ahead"] == [16]
            if row["case"] == "held, interleaved, bf16":
                assert row["program"] == "follow" or {"4x32", 16} & {*row["loads"], *row["ahead"]}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_compiled_layer_runs_on_it(layout):
    shape, _, memory_format = LAYOUTS[layout]
    layer = bn.BatchNorm2d(shape[1], activation="relu")
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn_like(x)
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    layer.reset_running_stats()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with bn.backend("triton"):
        found = torch.autograd.grad(compiled(x), [x, *layer.parameters()], dy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiler_does_not_look_into_what_can_run():
    def chosen(x):
        return x + 1 if device.can_run() else x

    found = torch.compile(chosen, backend="eager", fullgraph=True)(torch.zeros(2))
    assert found.tolist() == [1, 1]
    assert not triton.takes(torch.zeros(2, device="cpu"))  # the interpreter is no GPU
