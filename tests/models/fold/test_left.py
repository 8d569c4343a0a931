"""What is not folded in modules, and why: what is not proved, and what does not verify."""

import pytest
import torch
from models.fold.folding import IMAGES, ROWS, Model, fold, sequential, trained
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import batchnorm as bn
from batchnorm.models.compare import largest_error


def test_tied_weights_are_left():
    model = Model(
        lambda m, x: m.norm(m.one(x)), one=nn.Linear(4, 4), two=nn.Linear(4, 4),
        norm=nn.BatchNorm1d(4),
    )  # fmt: skip
    model.two.weight = model.one.weight
    report = fold(trained(model), ROWS)[1]
    assert report.left["norm"].startswith("'one.weight' is 'two.weight', too")


def test_a_weight_with_several_biases_is_left():
    model = Model(
        lambda m, x: m.norm(m.linear(x)) + m.norm(F.linear(x, m.linear.weight, m.other)),
        linear=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), other=nn.Parameter(torch.randn(4)),
    )  # fmt: skip
    report = fold(trained(model), ROWS)[1]
    assert "'linear' is called with one bias and with another" in report.left["norm"]


def test_weights_that_lie_in_one_memory_are_not_written_over():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight.data = one.weight.data
    model = Model(
        lambda m, x: m.norm(m.one(x)) + m.two(x), one=one, two=two, norm=nn.BatchNorm1d(4)
    )
    assert fold(trained(model), ROWS)[1].folded == {"norm": ["one"]}


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "computed"])
def test_a_weight_that_is_computed_is_left(kind):
    linear = nn.Linear(4, 3)
    if kind == "computed":
        model = Model(lambda m, x: m.norm(F.linear(x, m.linear.weight * 2)), linear=linear)
    else:
        make = (
            parametrizations.weight_norm
            if kind == "weight norm"
            else parametrizations.spectral_norm
        )
        model = Model(lambda m, x: m.norm(m.linear(x)), linear=make(linear))
    model.norm = nn.BatchNorm1d(3)
    report = fold(trained(model), ROWS)[1]
    assert "it normalizes what linear with a computed weight returns" in report.left["norm"]


STANDS = {
    "relu": lambda x: F.relu(x),
    "dropout": lambda x: F.dropout(x, 0.0, True),
    "pad": lambda x: F.pad(x, (1, 1)),
    "add": lambda x: x + 1,
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "double": lambda x: x.to(torch.int64).double(),
}


@pytest.mark.parametrize("name", STANDS)
def test_what_computes_stands_between(name):
    model = Model(
        lambda m, x: m.norm(STANDS[name](m.conv(x))), conv=nn.Conv2d(4, 4, 1),
        norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    report = fold(trained(model), IMAGES)[1]
    assert report.left["norm"].startswith(f"it normalizes what {name} returns")


def test_what_is_written_over_is_not_read_later():
    def forward(m, x):
        x = x * 1
        y = m.norm(x)
        x += 5
        return m.linear(y) + x

    parts = {"norm": nn.BatchNorm1d(4), "linear": nn.Linear(4, 4)}
    report = fold(trained(Model(forward, **parts)), ROWS)[1]
    assert "iadd may write over what it normalizes" in report.left["norm"]

    def harmless(m, x):
        return F.relu_(m.norm(m.linear(x))).add_(1)

    assert fold(trained(Model(harmless, **parts)), ROWS)[1].folded == {"norm": ["linear"]}


def test_what_crosses_a_graph_break_is_used_elsewhere():
    def forward(m, x):
        x = m.first(m.conv(x))
        x = m.conv_2(x)
        torch._dynamo.graph_break()
        return m.second(x)

    model = Model(
        forward, conv=nn.Conv2d(4, 4, 1), first=nn.BatchNorm2d(4), conv_2=nn.Conv2d(4, 4, 1),
        second=nn.BatchNorm2d(4),
    )  # fmt: skip
    report = fold(trained(model), IMAGES)[1]
    assert report.folded == {"first": ["conv"]}
    assert "it normalizes what comes from outside of the graph" in report.left["second"]


def test_what_runs_where_no_graph_is_captured_is_left():
    @torch._dynamo.disable
    def hidden(m, x):
        return m.conv(x) + m.alone(x)

    model = Model(
        lambda m, x: hidden(m, m.norm(m.conv(x))), conv=nn.Conv2d(4, 4, 1),
        norm=nn.BatchNorm2d(4), alone=nn.BatchNorm2d(4), unused=nn.BatchNorm2d(4),
    )  # fmt: skip
    for verify in (True, False):
        report = fold(trained(model), IMAGES, verify=verify)[1]
        assert report.folded == {}
        assert "'conv.weight' is used where TorchDynamo captures no graph" in report.left["norm"]
        assert report.left["alone"] == "TorchDynamo captures no graph in which it is called"
        assert report.left["unused"] == "the example does not reach it"


def test_a_compiled_model():
    model = torch.compile(sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), backend="eager")
    folded, report = bn.fold(model, ROWS.double())
    assert report.folded == {"1": ["0"]}
    assert largest_error(model(ROWS.double()), folded(ROWS.double())) <= 1e-12


def test_many_models_of_one_class_and_none_the_less_it_is_compiled():
    for size in range(1, torch._dynamo.config.recompile_limit + 2):
        model = sequential(nn.Linear(size, 3), nn.BatchNorm1d(3))
        assert fold(model, torch.randn(2, size))[1].left == {}
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compile(model, backend=backend)(torch.randn(2, size).double())
    assert len(compiled) == 1


def test_a_layer_that_is_used_without_being_called_is_left():
    def forward(m, x):
        return F.batch_norm(
            m.linear(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias
        )

    model = Model(forward, linear=nn.Linear(4, 3), norm=nn.BatchNorm1d(3))
    report = fold(trained(model), ROWS)[1]
    assert report.left == {"norm": "its statistics are used without a call of it"}


def test_a_layer_whose_weight_is_read_elsewhere_is_left():
    model = Model(
        lambda m, x: m.norm(m.linear(x)) + m.norm.weight.square().sum(), linear=nn.Linear(4, 3),
        norm=nn.BatchNorm1d(3),
    )  # fmt: skip
    report = fold(trained(model), ROWS)[1]
    assert report.left == {"norm": "square reads 'norm.weight', too"}


def test_what_is_missed_later_is_found_and_left():
    def forward(m, x):
        x = m.second(m.b(F.relu(m.first(m.a(x)))))
        return x.to(m.second.weight.dtype)

    model = Model(
        forward, a=nn.Linear(4, 4), first=nn.BatchNorm1d(4), b=nn.Linear(4, 4),
        second=nn.BatchNorm1d(4),
    )  # fmt: skip
    _, report = fold(trained(model), ROWS)
    assert report.folded == {"first": ["a"]}
    assert report.left["second"].startswith(
        "with it folded, the model raises AttributeError: 'Identity'"
    )


def test_layers_that_make_the_error_too_large_are_left():
    model = nn.Sequential(
        *(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()),
        *(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()),
        *(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    ).eval()
    with torch.no_grad():
        model[4].running_mean.fill_(1e7)  # float32 has no digits left for what is around it
        model[3].bias.fill_(1e7)
    _, report = bn.fold(model, ROWS)
    assert list(report.folded) == ["1", "7"]
    assert "with it folded, the largest error is" in report.left["4"]
    assert report.max_error <= report.tol == 1e-4
    assert bn.fold(model, ROWS, tol=1e9)[1].left == {}
    assert list(bn.fold(model, ROWS, verify=False)[1].folded) == ["1", "4", "7"]


def test_where_says_which():
    model = sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert fold(model, ROWS, where="1")[1].folded == {"1": ["0"]}
    assert fold(model, ROWS, where=lambda name, layer: name == "3")[1].folded == {"3": ["2"]}
    with pytest.raises(ValueError, match="where has 'x', which is the name of no batch norm"):
        bn.fold(model, ROWS, where="x")


def test_keywords_and_outputs_of_any_structure():
    model = Model(
        lambda m, x, scale: {"y": [m.norm(m.linear(x)) * scale, 3]}, linear=nn.Linear(4, 3),
        norm=nn.BatchNorm1d(3),
    )  # fmt: skip
    x, factor = ROWS.double(), torch.tensor(2.0).double()
    report = bn.fold(trained(model), x, keywords={"scale": factor})[1]
    assert report.folded == {"norm": ["linear"]}


def test_a_model_that_draws_numbers_and_writes_over_its_input():
    model = Model(
        lambda m, x: m.norm(m.linear(x.add_(1))) + torch.rand(3), linear=nn.Linear(4, 3),
        norm=nn.BatchNorm1d(3),
    )  # fmt: skip
    model, x = trained(model), ROWS.double()
    before, state = x.clone(), torch.get_rng_state()
    assert bn.fold(model, x)[1].folded == {"norm": ["linear"]}
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_is_refused_and_so_is_what_cannot_be_compared():
    model = sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[1].train()
    with pytest.raises(ValueError, match=r"'1' is in training mode.*model.eval\(\) first"):
        bn.fold(model, ROWS.double())
    with pytest.raises(ValueError, match="example is missing"):
        bn.fold(model.eval())
    model = Model(lambda m, x: m.norm(m.linear(x)).argmax(), linear=nn.Linear(4, 3))
    model.norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="no floating-point number"):
        bn.fold(trained(model), ROWS.double())
    with pytest.raises(TypeError, match=r"model is a builtins\.str: expected"):
        bn.fold("model.pt2", ROWS)


def test_a_model_that_does_not_repeat_itself_is_refused():
    numbers = iter(range(100))
    model = Model(lambda m, x: m.norm(m.linear(x)) + next(numbers), linear=nn.Linear(4, 4))
    model.norm = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="nothing folded does not answer the same: its largest"):
        bn.fold(trained(model), ROWS.double())


def test_a_model_without_batch_norms_and_one_that_is_one():
    assert fold(sequential(nn.Linear(4, 3)), ROWS)[1].folded == {}
    report = fold(trained(bn.BatchNorm1d(4)), ROWS)[1]
    assert list(report.left) == [""]
    assert "left itself: it normalizes what comes from outside" in repr(report)


def test_a_report_fits_a_terminal():
    model = Model(
        lambda m, x: m.a_part_with_a_long_name(m.z(x)), z=nn.Identity(),
        a_part_with_a_long_name=sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Softmax(1)
        ),
    )  # fmt: skip
    report = fold(model.eval(), IMAGES)[1]
    assert all(len(line) <= 80 for line in repr(report).splitlines())
    assert repr(report).splitlines()[1] == ("  a_part_with_a_long_name.1 -> .0")
    assert report.to_dict() == {
        "folded": {"a_part_with_a_long_name.1": ["a_part_with_a_long_name.0"]},
        "left": {
            "a_part_with_a_long_name.3": "it normalizes what relu returns; softmax reads what it "
            "returns"
        },
        "max_error": report.max_error,
        "tol": 1e-10,
    }
