"""Each test compiles on its own: nothing of one is found compiled by the next."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    torch._dynamo.reset()
