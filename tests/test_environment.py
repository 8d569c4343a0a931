import torch

from batchnorm import __version__
from batchnorm.environment import describe


def test_says_what_a_measurement_was_made_on():
    found = describe()
    assert (found["batchnorm"], found["torch"]) == (__version__, torch.__version__)
    assert all(isinstance(value, str) and value for value in found.values())


def test_the_processor_is_named_where_linux_has_no_file_of_it(monkeypatch):
    monkeypatch.setattr("batchnorm.environment.Path.read_text", _missing)
    assert describe()["cpu"]


def _missing(*_, **__):
    raise FileNotFoundError
