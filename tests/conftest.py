"""What every test starts from: one seed, and fresh memory that is poisoned with NaN."""

import importlib.util
import os

os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is first imported
# Where the tensors of the tests are: on the CPU, unless `make test-gpu` says otherwise.
os.environ.setdefault("BATCHNORM_TEST_DEVICE", "cpu")
# read when Triton is first imported, which torch may do
os.environ["TRITON_INTERPRET"] = str(int(os.environ["BATCHNORM_TEST_DEVICE"] == "cpu"))

# as cuBLAS needs it where all is deterministic, see below
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import interpreter
import pytest
import torch
from hypothesis import settings

from batchnorm.kernels import native

if os.environ["TRITON_INTERPRET"] == "0":
    torch.set_default_device(os.environ["BATCHNORM_TEST_DEVICE"])  # which compilers see
elif importlib.util.find_spec("triton") is not None:
    interpreter.mend()

# What is drawn is drawn the same way each time: a test that fails can be run again.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # the tests themselves run side by side


@pytest.fixture(autouse=True)
def _start():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a library may have set more


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that a kernel forgot to write reads as NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN under this
    if native._native is not None:
        native._native.poison_tensors(True)
    yield
    torch.use_deterministic_algorithms(deterministic)
