"""Folding in programs of `torch.export`: saved, loaded, and the same."""

import io

import pytest
import torch
from architectures import make_architecture
from models.fold.folding import Model, trained
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.models.compare import largest_error

# torch.export asks torch for what it renamed
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def network(norm=nn.BatchNorm2d, **options):
    """Return a model with batch norms after a convolution and around a linear layer."""
    return trained(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False, groups=3), norm(6, **options), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 5, bias=False),
            nn.BatchNorm1d(5),
        )
    )  # fmt: skip


def images(n=2):
    return torch.randn(n, 3, 8, 8, dtype=torch.float64)


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def norms_of(program):
    return [node for node in program.graph.nodes if "batch_norm" in str(node.target)]


@pytest.mark.parametrize("is_decomposed", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_a_program_is_folded_and_runs_from_a_file(is_decomposed, norm):
    model = network(norm)
    program = export(model, (images(),), dynamic_shapes=({0: Dim("n", min=1, max=64)},))
    if is_decomposed:
        program = program.run_decompositions()
    before, code = dict(program.state_dict), str(program.graph)
    folded, report = bn.fold(program)
    assert report.folded == {"1": ["0"], "5": ["6"], "7": ["6"]}
    assert report.left == {}
    assert report.max_error <= 1e-12
    assert type(folded) is ExportedProgram
    assert sorted(folded.state_dict) == ["0.bias", "0.weight", "6.bias", "6.weight"]
    assert norms_of(folded) == []
    assert str(program.graph) == code
    assert program.state_dict.keys() == before.keys()
    assert all(torch.equal(program.state_dict[name], before[name]) for name in before)
    x = images(5)
    with torch.no_grad():
        assert largest_error(model(x), reloaded(folded).module()(x)) <= 1e-12
    folded.run_decompositions()


@pytest.mark.parametrize("is_decomposed", [False, True])
def test_what_a_program_returns_keeps_its_place(is_decomposed):
    model = Model(
        lambda m, x, y: {"b": m.norm(m.conv(x)), "a": [m.norm(m.conv(y)), x]},
        conv=nn.ConvTranspose2d(3, 4, 2, bias=False), norm=nn.BatchNorm2d(4, affine=False),
    )  # fmt: skip
    x, y = images(), images()
    program = export(trained(model), (x, y))
    program = program.run_decompositions() if is_decomposed else program
    folded, report = bn.fold(program, (x, y))
    assert report.folded == {"norm": ["conv"]}
    assert largest_error(model(y, x), reloaded(folded).module()(y, x)) <= 1e-12


@pytest.mark.parametrize("kind", ["conv", "shift", "written", "no statistics", "branch"])
def test_what_is_left(kind):
    model = Model(
        lambda m, x: F.relu(y := m.conv(x)) + m.norm(y), conv=nn.Conv2d(3, 3, 1),
        norm=nn.BatchNorm2d(3),
    )  # fmt: skip
    reason = "relu reads what it normalizes, too; add reads what it returns"
    nn.init.ones_(model.norm.bias)
    if kind == "shift":
        model.function = lambda m, x: m.conv(m.norm(x))
        model.conv = nn.Conv2d(3, 3, 3, padding=1)
        reason = "its shift would not be the same everywhere behind 'conv', which pads with zeros"
    if kind == "no statistics":
        model.norm = nn.BatchNorm2d(3, track_running_stats=False)
        reason = "it has no running statistics"
    if kind == "written":
        model.norm = bn.BatchNorm2d(3)

        def forward(m, x):
            y = m.norm(m.conv(x))
            m.norm.running_mean.add_(1)
            return y

        model.function = forward
        reason = "add_ may write over 'norm.running_mean'"
    if kind == "branch":

        def forward(m, x):
            with torch.set_grad_enabled(not torch.is_grad_enabled()):
                return m.norm(m.conv(x)) * 2

        model.function = forward
        reason = "it is in a branch of the program, or in a part with a mode of its own"
    program = export(model.eval().double(), (images(),))
    _, report = bn.fold(program)
    assert report.folded == {}
    assert all(reason in left for left in report.left.values())
    assert len(report.left) == 1
    if kind == "written":
        assert not any(name.endswith("mean") and v.any() for name, v in program.state_dict.items())
    assert report.max_error == 0


@pytest.mark.parametrize("is_decomposed", [False, True])
def test_a_bias_that_several_share_stays_that_of_the_others(is_decomposed):
    model = Model(
        lambda m, x: m.norm(m.one(x)) + m.two(x), one=nn.Linear(3, 3), two=nn.Linear(3, 3),
        norm=nn.BatchNorm1d(3),
    )  # fmt: skip
    model.two.bias = model.one.bias
    model, x = trained(model), torch.randn(4, 3).double()
    program = export(model, (x,))
    program = program.run_decompositions() if is_decomposed else program
    folded, report = bn.fold(program)
    assert report.folded == {"norm": ["one"]}
    assert largest_error(model(-x), reloaded(folded).module()(-x)) <= 1e-12


def test_where_takes_patterns_and_no_function():
    program = export(network(), (images(),))
    _, report = bn.fold(program, where=["1", "7"], tol=1e-9)
    assert list(report.folded) == ["1", "7"]
    assert report.tol == 1e-9
    with pytest.raises(ValueError, match="where has 'x', which is the name of no batch norm"):
        bn.fold(program, where="x")
    with pytest.raises(TypeError, match="where is a function of modules"):
        bn.fold(program, where=lambda name, layer: True)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"was exported in training mode.*model.eval\(\)"):
        bn.fold(export(network().train(), (images(),)))
    dropping = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()).eval()
    dropping[2].train()
    with pytest.raises(ValueError, match="'dropout' was exported in training mode"):
        bn.fold(export(dropping, (torch.randn(2, 3),)))
    program = export(network(), (images(),))
    program.example_inputs = None
    with pytest.raises(ValueError, match="brings no example inputs: pass the arguments"):
        bn.fold(program)
    _, report = bn.fold(program, verify=False)
    assert repr(report).splitlines()[0] == "3 folded, 0 left, not verified"
    assert bn.fold(program, images())[1].folded == report.folded


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet", 12), ("swiftformer", 14), ("mobilenet_v2", 52), ("wav2vec2_conformer", 2)],
)
def test_published_architectures(name, count):
    model, example = make_architecture(name)
    folded, report = bn.fold(export(model, example))
    assert (len(report.folded), report.left) == (count, {})
    assert report.max_error <= 1e-5
    assert norms_of(folded) == []
    assert not any("running" in key for key in folded.state_dict)
    with torch.no_grad():
        assert largest_error(model(*example), folded.module()(*example)) <= 1e-5
