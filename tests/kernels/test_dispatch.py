import logging

import pytest
import torch

import batchnorm as bn
from batchnorm.kernels import Form, choose, dispatch
from batchnorm.kernels.eager import Eager

#: What serves here without the picky one.
OTHER = next(b.name for b in bn.backends() if b.available() is None)


class Picky(Eager):
    """A backend that takes float32 only, and counts what it served."""

    name = "picky"

    def __init__(self, missing=None):
        super().__init__()
        self.missing, self.served = missing, 0

    def available(self):
        return self.missing

    def supports(self, x, form):
        return None if x.dtype == torch.float32 else f"it does not take {x.dtype}"

    def normalize(self, given, out=None):
        self.served += 1
        return super().normalize(given, out)


@pytest.fixture
def picky(monkeypatch):
    """Put a preferred backend in front of the others."""
    backend = Picky()
    monkeypatch.delenv("BATCHNORM_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_BACKENDS", {"picky": backend, **dispatch._BACKENDS})
    dispatch._say_once.cache_clear()
    return backend


def test_the_first_that_can_take_it_serves(picky):
    assert choose(torch.zeros(2, 3), Form()) is picky
    assert choose(torch.zeros(2, 3, dtype=torch.float64), Form()).name == OTHER
    assert [backend.name for backend in bn.backends()] == ["picky", "native", "triton", "eager"]


def test_falling_through_says_why_once(picky, caplog):
    with caplog.at_level(logging.INFO, logger="batchnorm"):
        for _ in range(3):
            bn.batch_norm(torch.randn(4, 3, dtype=torch.float64), training=True)
    said = [record.getMessage() for record in caplog.records]
    assert [message for message in said if "picky" in message] == [
        "backend 'picky' does not serve here: it does not take torch.float64"
    ]


def test_a_forced_backend_serves_or_raises_with_the_reason(picky):
    with bn.backend("picky"):
        assert choose(torch.zeros(2, 3), Form()) is picky
        with pytest.raises(RuntimeError, match=r"'picky' .* it does not take torch.float64"):
            bn.batch_norm(torch.zeros(4, 3, dtype=torch.float64), training=True)
        with bn.backend("eager"):
            assert choose(torch.zeros(2, 3), Form()).name == "eager"
        assert choose(torch.zeros(2, 3), Form()) is picky
    picky.missing = "no compiler"
    assert choose(torch.zeros(2, 3), Form()).name == OTHER
    with bn.backend("picky"), pytest.raises(RuntimeError, match="no compiler"):
        choose(torch.zeros(2, 3), Form())


def test_the_choice_ends_with_the_block_also_on_an_error():
    with pytest.raises(KeyError), bn.backend("eager"):
        raise KeyError
    assert dispatch._forced.get() is None


@pytest.fixture
def set_variable(monkeypatch):
    """Set the environment variable as if before the process began."""

    def set_it(value):
        monkeypatch.setenv("BATCHNORM_BACKEND", value)
        dispatch._from_environment.cache_clear()

    yield set_it
    monkeypatch.undo()
    dispatch._from_environment.cache_clear()


def test_the_environment_variable_forces_and_the_block_goes_before_it(picky, set_variable):
    set_variable("eager")
    assert choose(torch.zeros(2, 3), Form()).name == "eager"
    with bn.backend("picky"):
        assert choose(torch.zeros(2, 3), Form()) is picky
    set_variable("cuda")
    with pytest.raises(ValueError, match="BATCHNORM_BACKEND is 'cuda': expected one of picky"):
        choose(torch.zeros(2, 3), Form())


def test_an_unknown_name_is_refused():
    with (
        pytest.raises(ValueError, match="backend is 'cuda': expected one of native, triton, eager"),
        bn.backend("cuda"),
    ):
        pass


def test_the_backward_pass_uses_the_backend_of_the_forward_pass(picky, monkeypatch):
    used = []
    monkeypatch.setattr(picky, "apply_grad", lambda *a: used.append(1) or Eager().apply_grad(*a))
    x = torch.randn(4, 3, requires_grad=True)
    y = bn.batch_norm(x, training=True)
    with bn.backend("eager"):
        y.backward(torch.randn(4, 3))
    assert used == [1]


def test_a_second_derivative_is_taken_by_the_differentiable_steps(picky):
    x = torch.randn(4, 3, requires_grad=True)
    y = bn.batch_norm(x, training=True)
    (dx,) = torch.autograd.grad(y, x, torch.randn(4, 3), create_graph=True)
    assert dx.requires_grad
    assert picky.served == 1
