"""What changes in place before, between and after what would run fused: nothing reads too late."""

import pytest
import torch
from models.accelerate.agreement import WAYS, Ways, assert_agrees
from models.accelerate.networks import Network, doubles, images
from torch.nn import functional as F

FUSED, LATER = "add + relu", "it is the residual of another one"
MODE = "a mode changes before what follows"
READS = "what it reads changes before what is added is there"
STATISTICS = "its running statistics are read before what is added is there"
TWICE = "it is used 2 times"


def before(m, x, r):
    r = r * 1
    r.mul_(2)
    return F.relu(m.norms[0](x) + r)


def between(m, x, r):
    r = r * 1
    y = m.norms[0](x)
    r.mul_(2)
    return F.relu(y + r)


def after(m, x, r):
    r = r * 1
    y = F.relu(m.norms[0](x) + r)
    r.mul_(2)
    return y, r


def after_by_a_view(m, x, r):
    r = r * 1
    y = F.relu(m.norms[0](x) + r)
    r[:1].mul_(2)
    return y


def after_by_a_list(m, x, r):
    r = r * 1
    y = F.relu(m.norms[0](x) + r)
    torch._foreach_mul_([r], 2.0)
    return y


def after_as_data(m, x, r):
    r = r * 1
    y = F.relu(m.norms[0](x) + r)
    r.data.mul_(2)
    return y


@torch.library.custom_op("batchnorm_tests::double", mutates_args={"values"})
def double(values: torch.Tensor) -> None:
    values.mul_(2)


def after_by_an_operator(m, x, r):
    r = r.detach() * 1
    y = F.relu(m.norms[0](x) + r)
    double(r)
    return y


def between_by_an_operator(m, x, r):
    r = r.detach() * 1
    y = m.norms[0](x)
    double(values=r)
    return F.relu(y + r)


def between_by_a_list(m, x, r):
    r = r * 1
    y = m.norms[0](x)
    torch._foreach_mul_([r], 2.0)
    return F.relu(y + r)


def between_as_data(m, x, r):
    r = r * 1
    y = m.norms[0](x)
    r.data.mul_(2)
    return F.relu(y + r)


def between_as_a_part(m, x, r):
    r = r * 1
    y = m.norms[0](x[:2])
    part = r[:2]
    r.mul_(2)
    return F.relu(y + part)


def between_and_after_by_an_item(m, x, r):
    r = r * 1
    y = m.norms[0](x)
    r[0] = 7
    y = F.relu(y + r)
    r[1] = 3
    return y


def between_as_out(m, x, r):
    with torch.no_grad():
        r, index = r * 1, torch.zeros_like(r[0], dtype=torch.long)
        y = m.norms[0](x)
        torch.max(x, 0, out=(r[0], index))
        return F.relu(y + r)


def input_without_gradient(m, x, r):
    with torch.no_grad():
        x = x * 1
        y = m.norms[0](x)
        x.mul_(2)
        q = r * x
        return F.relu(y + q)


def a_shared_layer(m, x, r):
    y = m.norms[0](x)
    q = m.norms[0](r)
    return F.relu(y + q)


def a_shared_layer_later(m, x, r):
    y = m.norms[0](x)
    y += F.relu(m.norms[0](r))
    return F.relu(y)


def buffer_read(m, x, r):
    y = m.norms[0](x)
    q = r * m.norms[0].running_mean.sum()
    return F.relu(y + q)


def part_of_a_buffer_read(m, x, r):
    y = m.norms[0](x)
    q = r * m.norms[0].running_var.view(2, 2)[0].sum()
    return F.relu(y + q)


def buffer_written(m, x, r):
    y = m.norms[0].eval()(x.detach())
    m.norms[0].running_mean.add_(1)
    q = r * 2
    return y.detach() + q


def weight_written(m, x, r):
    with torch.no_grad():
        y = m.norms[0](x)
        m.norms[0].weight.add_(1)
        q = r * 2
        return F.relu(y + q)


def no_gradient_after(m, x, r):
    y = m.norms[0](x)
    with torch.no_grad():
        z = F.relu(y)
    return z * r


def no_gradient_before(m, x, r):
    with torch.no_grad():
        y = m.norms[0](x)
    return F.relu(y + r)


def no_gradient_of_the_residual(m, x, r):
    y = m.norms[0](x)
    with torch.no_grad():
        q = r * 2
    return F.relu(y + q)


def no_gradient_of_the_sum(m, x, r):
    y = m.norms[0](x)
    torch.set_grad_enabled(False)
    z = y + r
    torch.set_grad_enabled(True)
    return F.relu(z) * r


def autocast_after(m, x, r):
    y = m.norms[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(y)


def each_other(m, x, r):
    a, b = m.norms[0](x), m.norms[1](m.convs[0](x))
    y = F.relu(a + b)
    return F.relu(b + y), y


def each_other_in_place(m, x, r):
    a, b = m.norms[0](x), m.norms[1](m.convs[0](x))
    b += a
    return F.relu(b)


def residual_made_before(m, x, r):
    b = m.norms[0](r)
    a = m.norms[1](m.convs[0](x))
    return F.relu(a + F.relu(b))


def residual_made_before_in_place(m, x, r):
    b = m.norms[0](r)
    a = m.norms[1](m.convs[0](x))
    b.relu_()
    return F.relu(a + b)


def residual_made_by_layers(m, x, r):
    a, b, c = m.norms[0](x), m.norms[1](m.convs[0](x)), m.norms[2](m.convs[1](r))
    c = F.relu(c + F.relu(b))
    return F.relu(a + c)


def residual_used_before(m, x, r):
    a, b = m.norms[0](x), m.norms[1](r)
    y = a + b
    b.relu_()
    return F.relu(y)


CASES = {
    before: [FUSED],
    between: [FUSED],
    after: ["add"],
    after_by_a_view: ["add"],
    after_by_a_list: ["add"],
    after_as_data: ["add"],
    after_by_an_operator: ["add"],
    between_by_an_operator: [FUSED],
    between_by_a_list: [FUSED],
    between_as_data: [FUSED],
    between_as_a_part: [FUSED],
    between_and_after_by_an_item: ["add"],
    between_as_out: [FUSED],
    input_without_gradient: [READS],
    a_shared_layer: [READS, FUSED],
    a_shared_layer_later: [READS, "relu"],
    buffer_read: [STATISTICS],
    part_of_a_buffer_read: [STATISTICS],
    buffer_written: ["detach follows"],
    weight_written: [READS],
    no_gradient_after: [MODE],
    no_gradient_before: [MODE],
    no_gradient_of_the_residual: [MODE],
    no_gradient_of_the_sum: [MODE],
    autocast_after: [MODE],
    each_other: [FUSED, TWICE],
    each_other_in_place: ["it is added in place to the other tensor", FUSED],
    residual_made_before: ["relu", FUSED],
    residual_made_before_in_place: ["relu", FUSED],
    residual_made_by_layers: [FUSED, "relu", FUSED],
    residual_used_before: ["add", TWICE],
}


@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_nothing_is_read_too_late(function):
    assert assert_agrees(Network(function), images(), steps=1) == CASES[function]


#: What is changed between the forward and the backward pass: autograd refuses, or the gradient is
#: right all the same; it is never wrong.
def _residual(model, x, r, y):
    r.mul_(2)


def _input(model, x, r, y):
    x.mul_(2)


def _output(model, x, r, y):
    y.mul_(2)


def _weight(name):
    def change(model, x, r, y):
        model.get_parameter(name).mul_(2)

    return change


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (_residual, "fused"),  # which keeps it for the activation, where torch keeps what it makes
        (_weight("norms.0.bias"), "fused"),
        (_input, "always"),
        (_weight("norms.0.weight"), "always"),
        (_weight("convs.0.weight"), "always"),
        (_output, "by torch"),
    ],
    ids=["residual", "bias", "input", "weight", "weight of another layer", "output"],
)
def test_what_changes_before_the_backward_pass_is_noticed(change, refused):
    def function(m, x, r):
        return F.relu(m.norms[0](m.convs[0](x)) + r)

    x, r, dy = doubles(n=3)
    model = Network(function).double()
    compiled = torch.compile(model, backend=(ways := Ways()))

    def gradients(run):
        given = x.clone(), r.clone()
        y = run(*given)
        with torch.no_grad():
            change(model, *given, y)
        return torch.autograd.grad(y, [*model.norms[0].parameters(), model.convs[0].weight], dy)

    for way in ("by torch", *WAYS):
        ways.way = way
        run = model if way == "by torch" else compiled
        if refused in ("always", way) or (refused == "fused" and way != "by torch"):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(run)
        else:
            gradients(run)
