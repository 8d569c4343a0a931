"""A model that predicts is exported with torch's own batch norms, and runs without this package."""

import copy
import subprocess
import sys
from collections import Counter

import pytest
import torch
from architectures import make_architecture
from torch import nn
from torch.utils import _pytree as pytree

import batchnorm as bn
from batchnorm.models.compare import largest_error

# what torch's exporters ask torch for
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")

NODE = "aten.batch_norm.default"
DECOMPOSED = "aten._native_batch_norm_legit_no_training.default"
#: What has to do with the values on the way to the node, and back.
AROUND = {
    "aten.sym_size.int", "aten.flatten.using_ints", "aten.view.default", "aten.unsqueeze.default",
    "aten.squeeze.dim", "aten.movedim.int", "aten.contiguous.default", "aten.empty_like.default",
    "aten.copy_.default",
}  # fmt: skip

#: Layers of every kind, and what one takes.
LAYERS = {
    "any rank": (bn.BatchNorm(4), (3, 4, 5)),
    "channels last": (bn.BatchNorm(4, channel_dim=-1), (3, 5, 4)),
    "channels between": (bn.BatchNorm(4, channel_dim=2), (3, 5, 4, 2)),
    "1d": (bn.BatchNorm1d(4), (3, 4)),
    "2d": (bn.BatchNorm2d(4), (3, 4, 2, 5)),
    "3d": (bn.BatchNorm3d(4), (3, 4, 1, 2, 2)),
    "sync": (bn.SyncBatchNorm(4), (3, 4, 5)),
    "ghost": (bn.GhostBatchNorm(4, ghost_size=2), (3, 4, 5)),
    "renorm": (bn.BatchRenorm(4), (3, 4, 5)),
    "frozen": (bn.FrozenBatchNorm(4), (3, 4, 5)),
    "banked": (bn.BankedBatchNorm(4, banks=("one", "other")), (3, 4, 5)),
    "no affine part": (bn.BatchNorm(4, affine=False), (3, 4)),
    "no bias": (bn.BatchNorm(4, bias=False), (3, 4)),
}


def trained(name):
    """Return a layer in evaluation that is not the identity, and a batch."""
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return layer.eval(), torch.randn(shape)


def calls(program):
    """Return how often an exported program calls what."""
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in LAYERS), ("any rank", True), ("banked", True)]
)
def test_every_layer_is_one_standard_node(name, strict):
    layer, x = trained(name)
    program = torch.export.export(
        layer, (x,), dynamic_shapes={"input": {0: torch.export.Dim("batch")}}, strict=strict
    )
    found = calls(program)
    assert found.pop(NODE) == 1
    assert set(found) <= AROUND
    assert calls(program.run_decompositions())[DECOMPOSED] == 1
    with torch.no_grad():
        for batch in (x, torch.cat([x, x])):
            assert largest_error(layer(batch), program.module()(batch)) < 1e-6


def through_onnx(program, nodes):
    """Return an ONNX program, optimized, which before that had so many batch norms."""
    onnx = torch.onnx.export(program, verbose=False, optimize=False)
    assert sum(node.op_type == "BatchNormalization" for node in onnx.model.graph) == nodes
    onnx.optimize()
    return onnx


class Every(nn.Module):
    """All layers, side by side."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(trained(name)[0] for name in LAYERS)

    def forward(self, *xs):
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


WITHOUT_US = """
import sys, torch

class Barred:
    def find_spec(self, name, *_):
        assert name.partition(".")[0] != "batchnorm"

sys.meta_path.insert(0, Barred())
program, inputs, expected = sys.argv[1:]
program = torch.export.load(program)
found = program.module()(*torch.load(inputs))
for y, wanted in zip(found, torch.load(expected), strict=True):
    torch.testing.assert_close(y, wanted)
print(len(found), "agree")
"""


def test_an_exported_program_runs_where_this_package_is_not(tmp_path):
    model, xs = Every().eval(), tuple(trained(name)[1] for name in LAYERS)
    paths = [tmp_path / name for name in ("program.pt2", "inputs.pt", "expected.pt")]
    torch.export.save(torch.export.export(model, xs), paths[0])
    torch.save(xs, paths[1])
    torch.save(model(*xs), paths[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_US, *paths],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == f"{len(LAYERS)} agree\n", done.stderr


def test_onnx_runtime_has_one_node_of_every_layer():
    pytest.importorskip("onnxscript")
    model, xs = Every().eval(), tuple(trained(name)[1] for name in LAYERS)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(
            model, xs, dynamic_shapes={"xs": tuple({0: batch} for _ in xs)}
        )
        onnx = through_onnx(program, len(LAYERS))
        for inputs in (xs, [torch.cat([x, x]) for x in xs]):
            assert largest_error(model(*inputs), list(onnx(*inputs))) < 1e-6


def test_frozen_layers_are_standard_nodes_in_training_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), bn.BatchNorm1d(4))
    bn.freeze(model)
    found = calls(torch.export.export(model.train(), (torch.randn(5, 3),)))
    assert found == {"aten.linear.default": 1, NODE: 2}


def test_without_running_statistics_no_node_is_in_training_mode():
    program = torch.export.export(
        bn.BatchNorm1d(4, track_running_stats=False).eval(), (torch.randn(5, 4),)
    )
    assert not [target for target in calls(program) if "batch_norm" in target]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    model = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4, activation="relu"), nn.Linear(4, 2))
    report = bn.check_parity(model.to(dtype), torch.randn(5, 3, dtype=dtype), ways=["exported"])
    assert report.ok
    assert report.ways[0].nodes == 1


#: Convolutional, mobile with depthwise convolutions, segmentation, speech, a detector whose frozen
#: layers are arithmetic until they are converted: and how many batch norms they have.
EXPORTED = {
    "resnet": 12, "regnet": 17, "mobilenet_v1": 27, "efficientnet": 25, "segformer": 1,
    "swiftformer": 14, "detr": 9, "wav2vec2_conformer": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_published_architectures(name):
    """With our layers the graph is that of the stock model, node for node, and ONNX has it."""
    pytest.importorskip("onnxscript")
    model, example = make_architecture(name)
    with torch.no_grad():
        stock, graph = model(*example), calls(torch.export.export(model, example))
        bn.convert(model)
        assert sum(isinstance(m, bn.BatchNorm) for m in model.modules()) == EXPORTED[name]
        program = torch.export.export(model, example)
        assert calls(program)[NODE] == EXPORTED[name]
        assert calls(program) == graph or name == "detr"
        assert largest_error(stock, program.module()(*example)) < 1e-5
        onnx = through_onnx(program, EXPORTED[name])
    tensors = [v for v in pytree.tree_leaves(stock) if isinstance(v, torch.Tensor)]
    assert largest_error(tensors, list(onnx(*example))) < 1e-5
