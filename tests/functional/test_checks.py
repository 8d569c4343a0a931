import pytest
import torch

import batchnorm as bn


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, "x.real and x.imag"),
        ({"input": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, r"torch.int64.*x.float"),
        ({"weight": torch.ones(3) * 1j}, TypeError, "weight is complex"),
        ({"mask": [True] * 4}, TypeError, "mask is a list: expected a tensor"),
        ({"eps": 0.0}, ValueError, "eps must be positive during training, but got 0.0"),
        ({"eps": -1.0}, ValueError, "eps must be positive during training, but got -1.0"),
        ({"weight": torch.ones(2)}, RuntimeError, "weight should contain 3 elements not 2"),
        ({"bias": torch.ones(4)}, RuntimeError, "bias should contain 3 elements not 4"),
        (
            {"running_mean": torch.ones(2), "running_var": torch.ones(3)},
            RuntimeError,
            "running_mean should contain 3",
        ),
        ({"running_mean": torch.ones(3)}, ValueError, "both be None or neither be None"),
        (
            {"running_mean": torch.ones(3), "running_var": torch.ones(2)},
            RuntimeError,
            "running_var should contain 3",
        ),
        ({"residual": torch.ones(3)}, ValueError, r"residual is of size \(3,\).*\(4, 3\)"),
        ({"channel_dim": 2}, ValueError, "channel_dim is 2, but the input has 2 dimensions"),
        ({"activation": "mish"}, ValueError, "'mish': expected None or one of relu"),
        ({"activation": ("relu", 0.1)}, ValueError, "'relu' has no parameter"),
        ({"training": False}, RuntimeError, "must be defined in evaluation mode"),
        ({"on_small_batch": "x", "input": torch.zeros(1, 3)}, ValueError, "'x': expected"),
    ],
)
def test_says_what_was_got_and_what_was_expected(arguments, error, message):
    call = {"input": torch.zeros(4, 3), "training": True, **arguments}
    with pytest.raises(error, match=message):
        bn.batch_norm(**call)


def test_eps_may_be_zero_but_not_negative_in_evaluation():
    x, running = torch.randn(4, 3), (torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(bn.batch_norm(x, *running, eps=0.0), x)
    with pytest.raises(ValueError, match="eps must be non-negative, but got -1"):
        bn.batch_norm(x, *running, eps=-1)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias", "residual"])
def test_what_is_on_another_device_is_refused(name):
    x = torch.randn(4, 3)
    given = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    given[name] = torch.ones(3, device="meta") if name != "residual" else x.to("meta")
    with pytest.raises(RuntimeError, match=f"{name} is on meta, but the input is on cpu: move"):
        bn.batch_norm(x, **given)
