import pytest
import torch
from support import ACTIVATIONS, activate

from batchnorm.kernels import Activation


@pytest.mark.parametrize("given", ACTIVATIONS[1:])
def test_value_and_gradient_are_those_of_torch(given):
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0])
    z = torch.cat([torch.linspace(-30, 30, 601), kinks]).double().requires_grad_()
    g = torch.randn_like(z)
    activation = Activation.parse(given)
    theirs = activate(given, z)
    torch.testing.assert_close(activation(z), theirs)
    (gradient,) = torch.autograd.grad(theirs, z, g)
    torch.testing.assert_close(activation.backward(g, z.detach()), gradient)


def test_defaults_are_those_of_torch():
    assert Activation.parse("leaky_relu") == Activation("leaky_relu", 0.01)
    assert Activation.parse("elu") == Activation("elu", 1.0)
    assert Activation.parse("relu") == Activation("relu", None)
    assert Activation.parse(None) is None


@pytest.mark.parametrize("given", ACTIVATIONS[1:])
def test_spec_is_what_a_user_would_write(given):
    assert Activation.parse(given).spec == given
    assert Activation.parse(Activation.parse(given).spec) == Activation.parse(given)
