"""The bench on a GPU, as far as it goes without one: what is measured, checked and timed."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from bench.small_gpu import case_of
from torch import nn

from batchnorm.bench.cases import BOTH, DTYPES, FORWARD, INFERENCE, RELU, RESIDUAL
from batchnorm.bench.contenders import Step
from batchnorm.bench.errors import WrongResult
from benchmarks.gpu import clock, layers
from benchmarks.gpu.cases import COUNTS, LAYOUTS, passes, plan, resnet50, title
from benchmarks.gpu.contenders import BASE, OURS, PEERS, Module
from benchmarks.gpu.posing import check, copies, pose, relative_error
from benchmarks.models.networks import NETWORKS

CPU = torch.device("cpu")


class TestCases:
    def test_the_layers_are_those_of_the_network(self):
        found = []

        def note(module, given, _):
            found.append(tuple(given[0].shape[1:]))

        model = NETWORKS["resnet50"].make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(note)
        with torch.no_grad():
            model(torch.zeros(1, 3, 224, 224))
        assert Counter(found) == COUNTS
        assert COUNTS.total() == 53
        assert len(COUNTS) == 12
        follows = Counter(layer.follows for layer in resnet50())
        assert follows == {RELU: 33, RESIDUAL: 16, "plain": 4}

    @pytest.mark.parametrize(
        ("mode", "fusion", "floor", "once"),
        [
            (FORWARD, RELU, 3, 2),
            (FORWARD, RESIDUAL, 4, 3),
            (BOTH, RELU, 8, 5),
            (BOTH, RESIDUAL, 12, 8),
            (INFERENCE, RELU, 2, 2),
            (INFERENCE, RESIDUAL, 3, 3),
        ],
    )
    def test_passes(self, mode, fusion, floor, once):
        assert passes(mode, fusion) == (floor, once)

    def test_what_the_figures_are_about_comes_first(self):
        first, others = plan(256, ("bfloat16", "float32"), quick=False)
        assert {(case.mode, case.problem.dtype) for case in first} == {(BOTH, "bfloat16")}
        assert len(first) == 12 * 2 * 2
        assert len({*first, *others}) == len(first) + len(others) == 12 * 2 * 2 * 3 * 2
        quick, none = plan(2, ("bfloat16",), quick=True)
        assert 0 < len(quick) < len(first)
        assert none == []

    def test_a_case_says_what_it_is(self):
        assert title(case_of()) == "2x256x14x14 NHWC, bfloat16, relu, forward+backward"


class TestRight:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("fusion", [RELU, RESIDUAL])
    @pytest.mark.parametrize("mode", [BOTH, FORWARD, INFERENCE])
    @pytest.mark.parametrize("contender", [BASE, OURS, PEERS["jax"]], ids=lambda c: c.name)
    def test_all_agree_with_float64(self, contender, mode, fusion, dtype, layout, monkeypatch):
        monkeypatch.setattr("benchmarks.gpu.posing._PIECE", 500)  # several pieces
        if reason := contender.missing(CPU):
            pytest.skip(reason)
        case = case_of(layout, dtype, fusion, mode, (4, 5, 7, 6))
        posed = pose(case, CPU)
        for step in contender.steps(case, copies(posed, mode, 2000)):
            found = step.read(step.call())
            check(contender.name, contender.ours, case, found, posed)
            assert found[0].dtype == posed.x.dtype
            assert len(found) == (1 if mode != BOTH else 4 + (fusion == RESIDUAL))

    def test_what_is_wrong_is_not_timed_and_the_others_are(self):
        broken = Module("broken", lambda posed: nn.Identity())
        loud = Module("loud", lambda posed: 1 / 0)
        found = layers.measure(
            case_of(mode=FORWARD), {"a": broken, "b": loud}, CPU, layers.Effort(0, 2, 0)
        )
        assert [row.implementation for row in found.rows] == ["torch.nn", "batchnorm"]
        assert "WrongResult: broken is wrong: its y is off by" in found.failed["broken"]
        assert found.failed["loud"] == "ZeroDivisionError: division by zero"

    def test_what_is_not_finite_is_an_error(self):
        case = case_of(mode=FORWARD)
        posed = pose(case, CPU)
        y = posed.answers[FORWARD][0].values.clone()
        assert relative_error(y, posed.answers[FORWARD][0]) == 0
        y[1, 3, 2, 1] = torch.nan
        with pytest.raises(WrongResult, match="off by nan"):
            check("it", False, case, [y], posed)
        with pytest.raises(WrongResult, match="has the shape"):
            check("it", False, case, [y[:1]], posed)

    def test_there_are_as_many_inputs_as_the_cache_is_large(self):
        case = case_of(fusion=RESIDUAL)
        posed = pose(case, CPU)
        assert len(copies(posed, BOTH, 0)) == 1
        size = 3 * posed.x.nbytes
        found = copies(posed, BOTH, size)
        assert len(found) == 3
        assert len({p.x.data_ptr() for p in found}) == 3
        assert all(p.dy.equal(posed.dy) and p.x.stride() == posed.x.stride() for p in found)


class TestClock:
    def test_sets_take_turns(self):
        order = []
        timed = {
            "a": clock.Timed([lambda i=i: order.append(f"a{i}") for i in range(2)]),
            "b": clock.Timed([lambda: order.append("b")]),
        }
        times = clock.alternate(timed, CPU, 0, 3)
        assert order == ["a0", "b", "b", "a1", "a0", "b"]
        assert {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3}
        clock.alternate({"b": timed["b"]}, CPU, 0, 1, settled=True)
        assert order[-2:] == ["b", "b"]

    def test_events_and_graphs_are_used_as_they_have_to_be(self, monkeypatch):
        log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")

            def synchronize(self):
                log.append("wait")

            def elapsed_time(self, end):
                return 2.0

        class Stream:
            def wait_stream(self, other):
                pass

        class Graph:
            def replay(self):
                log.append("replay")

        fakes = {
            "Event": Event,
            "synchronize": lambda device=None: log.append("idle"),
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda _: nullcontext(),
            "CUDAGraph": Graph,
            "graph": lambda _: nullcontext(),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        step = clock.captured([Step(lambda i=i: (log.append("call"), i)) for i in (6, 7)])
        assert log == ["call"] * 2 * clock.WARMUP + ["idle", "call", "call"]
        assert step.call() == (None, 7)
        log.clear()
        times = clock.alternate(
            {"it": clock.Timed([lambda: log.append("call")], parts=2)}, torch.device("cuda"), 0, 1
        )
        assert times == {"it": [0.001]}
        assert log == ["idle", "record", "call", "record", "wait"]
