"""Folding in ONNX models: valid, of the same opset, and the same in ONNX Runtime."""

import numpy as np
import pytest
import torch
from architectures import make_architecture
from models.fold.folding import Model, trained
from torch import nn

import batchnorm as bn
from batchnorm.models.fold.onnx_nodes import norm_name

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.*were assigned during export"),
]


def graph(nodes, arrays, inputs, outputs=("y",), opset=17, dtype=np.float32):
    """Return a model of nodes, each as (kind, inputs, outputs, attributes)."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, i.split(), o.split(), o, **more) for op, i, o, more in nodes],
            "graph",
            [helper.make_tensor_value_info(n, kind, shape) for n, shape in inputs.items()],
            [helper.make_tensor_value_info(name, kind, None) for name in outputs],
            [numpy_helper.from_array(np.asarray(a, dtype), n) for n, a in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    model = onnx.shape_inference.infer_shapes(model)  # of the outputs, too
    onnx.checker.check_model(model)
    return model


def norm_arrays(channels, prefix=""):
    """Return the four tensors of a batch norm."""
    random = np.random.default_rng(channels)
    return {
        f"{prefix}scale": random.normal(size=channels),
        f"{prefix}shift": random.normal(size=channels),
        f"{prefix}mean": random.normal(size=channels),
        f"{prefix}var": random.uniform(0.5, 2, channels),
    }


def norm(x, y, prefix="", **attributes):
    names = " ".join(f"{prefix}{name}" for name in ("scale", "shift", "mean", "var"))
    return ("BatchNormalization", f"{x} {names}", y, attributes)


def fold(model, *shapes, **options):
    """Return the nodes' kinds and the report, of a model that is valid and computes what it did."""
    values = [np.random.default_rng(1).normal(size=s).astype(np.float32) for s in shapes]
    before = model.SerializeToString()
    folded, report = bn.fold(model, values, **options)
    assert model.SerializeToString() == before
    onnx.checker.check_model(folded, full_check=True)
    assert folded.opset_import == model.opset_import
    assert [v.name for v in folded.graph.output] == [v.name for v in model.graph.output]
    assert report.max_error <= 1e-5
    return folded, report


def random(*shape):
    return np.random.default_rng(2).normal(size=shape)


CONV, GEMM = {"w": random(5, 3, 3, 3)}, {"w": random(4, 5)}
#: The nodes, the weights, the shape of x, and the kinds of nodes that are left.
CASES = {
    "conv": ([("Conv", "x w", "h", {}), norm("h", "y")], CONV, (2, 3, 6, 6), "Conv"),
    "conv with a bias, padded": (
        [("Conv", "x w b", "h", {"pads": [1, 1, 1, 1]}), norm("h", "y")],
        {**CONV, "b": random(5)},
        (2, 3, 6, 6),
        "Conv",
    ),
    "depthwise": (
        [("Conv", "x w", "h", {"group": 5, "auto_pad": "SAME_UPPER"}), norm("h", "y")],
        {"w": random(5, 1, 3)},
        (2, 5, 6),
        "Conv",
    ),
    "transposed, grouped": (
        [("ConvTranspose", "x w", "h", {"group": 5, "strides": [2]}), norm("h", "y")],
        {"w": random(10, 1, 3)},
        (2, 10, 6),
        "ConvTranspose",
    ),
    "gemm": ([("Gemm", "x w", "h", {}), norm("h", "y")], GEMM, (3, 4), "Gemm"),
    "gemm with a bias": (
        [("Gemm", "x w b", "h", {"transB": 1}), norm("h", "y")],
        {"w": random(5, 4), "b": random(1, 5)},
        (3, 4),
        "Gemm",
    ),
    "product": ([("MatMul", "x w", "h", {}), norm("h", "y")], GEMM, (3, 4), "MatMul Add"),
    "product and sum": (
        [("MatMul", "x w", "p", {}), ("Add", "b p", "h", {}), norm("h", "y")],
        {**GEMM, "b": random(5)},
        (3, 4),
        "MatMul Add",
    ),
    "turned": (
        [("MatMul", "x w", "h", {}), ("Transpose", "h", "t", {"perm": [0, 2, 1]}), norm("t", "y")],
        GEMM,
        (2, 3, 4),
        "MatMul Add Transpose",
    ),
    "a weight that is turned": (
        [("Transpose", "w", "v", {}), ("MatMul", "x v", "h", {}), norm("h", "y")],
        {"w": random(5, 4)},
        (3, 4),
        "MatMul Add",
    ),
    "before": (
        [norm("x", "h"), ("Conv", "h w", "y", {})], {"w": random(4, 5, 2)}, (2, 5, 3), "Conv",
    ),
    "before, through a mean": (
        [
            norm("x", "h"),
            ("ReduceMean", "h", "m", {"axes": [2, 3], "keepdims": 0}),
            ("Gemm", "m w", "y", {}),
        ],
        {"w": random(5, 4)},
        (2, 5, 3, 3),
        "ReduceMean Gemm",
    ),
    "followed": (
        [("Conv", "x w", "h", {}), norm("h", "n"), ("Relu", "n", "y", {})],
        CONV,
        (2, 3, 6, 6),
        "Conv Relu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_batch_norm_is_gone(case):
    nodes, arrays, shape, kinds = CASES[case]
    model = graph(nodes, {**arrays, **norm_arrays(5)}, {"x": ("n", *shape[1:])})
    folded, report = fold(model, shape)
    assert [node.op_type for node in folded.graph.node] == kinds.split()
    assert (len(report.folded), report.left) == (1, {})
    assert not {t.name for t in folded.graph.initializer} & norm_arrays(5).keys()


LEFT = {
    "Relu reads what it normalizes, too": (
        [("Conv", "x w", "h", {}), ("Relu", "h", "r", {}), norm("h", "n"), ("Add", "r n", "y", {})],
        {"w": random(5, 5, 1)},
    ),
    "the output reads what it normalizes, too": (
        [("Conv", "x w", "y", {}), norm("y", "z")],
        {"w": random(5, 5, 1)},
    ),
    "'w' is called elsewhere, too, without it": (
        [("Conv", "x w", "h", {}), norm("h", "n"), ("Conv", "n w", "y", {})],
        {"w": random(5, 5, 1)},
    ),
    "Abs reads 'w', too": (
        [("Conv", "x w", "h", {}), norm("h", "n"), ("Abs", "w", "v", {}), ("Conv", "n v", "y", {})],
        {"w": random(5, 5, 1)},
    ),
    "Conv with a computed weight or bias": (
        [("Mul", "w w", "v", {}), ("Conv", "x v", "h", {}), norm("h", "y")],
        {"w": random(5, 5, 1)},
    ),
    "pads with zeros": (
        [norm("x", "n"), ("Conv", "n w", "y", {"pads": [1, 1]})],
        {"w": random(5, 5, 3)},
    ),
    "is transposed": (
        [norm("x", "n"), ("ConvTranspose", "n w", "y", {})],
        {"w": random(5, 5, 3)},
    ),
    "its channels are not those of 'w'": (
        [("MatMul", "x w", "h", {}), norm("h", "y")],
        {"w": random(6, 6)},
    ),
    "what it normalizes by is computed": (
        [("Conv", "x w", "h", {}), ("Abs", "mean", "m", {}),
         ("BatchNormalization", "h scale shift m var", "y", {})],
        {"w": random(5, 5, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left(reason):
    nodes, arrays = LEFT[reason]
    outputs = ("y", "z") if nodes[-1][2] == "z" else ("y",)
    model = graph(nodes, {**arrays, **norm_arrays(5)}, {"x": ("n", 5, 6)}, outputs)
    folded, report = fold(model, (2, 5, 6))
    assert report.folded == {}
    assert reason in next(iter(report.left.values()))
    assert [node.op_type for node in folded.graph.node] == [node[0] for node in nodes]


def test_a_bias_that_several_share_stays_that_of_the_others():
    nodes = [("Conv", "x w b", "h", {}), norm("h", "n"), ("Conv", "x w2 b", "m", {}),
             ("Gemm", "v w3 b", "g", {}), norm("g", "k"), ("Add", "n m", "y", {})]  # fmt: skip
    arrays = {"w": random(5, 3, 1, 1), "w2": random(5, 3, 1, 1), "w3": random(4, 5), "b": random(5)}
    model = graph(nodes, {**arrays, **norm_arrays(5)}, {"x": (2, 3, 6, 6), "v": (3, 4)}, ("y", "k"))
    folded, report = fold(model, (2, 3, 6, 6), (3, 4))
    assert report.folded == {"n": ["w"], "k": ["w3"]}
    assert {t.name for t in folded.graph.initializer} == {*arrays, "w.bias", "w3.bias"}


def test_a_bias_with_the_name_that_a_new_one_would_get():
    nodes = [("Conv", "x a.weight a.bias", "h", {}), norm("h", "n"),
             ("Conv", "x b.weight a.bias", "m", {}), ("Add", "n m", "y", {})]  # fmt: skip
    arrays = {"a.weight": random(5, 3, 1, 1), "b.weight": random(5, 3, 1, 1), "a.bias": random(5)}
    model = graph(nodes, {**arrays, **norm_arrays(5)}, {"x": (2, 3, 6, 6)}, ("y",))
    folded, report = fold(model, (2, 3, 6, 6))
    assert report.folded == {"n": ["a"]}
    assert {t.name for t in folded.graph.initializer} == {*arrays, "a.bias_"}


def test_each_layer_has_a_name_of_its_own():
    taken = dict.fromkeys(("bn", "bn_2"))
    nodes = [helper.make_node(*norm("h", "y")[:1], ["h", "s", "b", f"{n}.running_mean", "v"], ["y"])
             for n in ("bn", "bn_2", "bn_4")]  # fmt: skip
    assert [norm_name(node, taken) for node in nodes] == ["bn_3", "bn_2_2", "bn_4"]


def test_what_is_an_input_may_be_another_tensor():
    model = graph(
        [("Conv", "x w", "h", {}), norm("h", "y")],
        {**CONV, **norm_arrays(5)},
        {"x": (2, 3, 6, 6), "mean": (5,)},
    )
    report = bn.fold(model, verify=False)[1]
    assert "or an input of the model" in report.left["y"]


def test_one_that_stands_in_a_branch_is_left():
    body = helper.make_graph(
        [helper.make_node(*norm("h", "inner")[:1], norm("h", "inner")[1].split(), ["inner"])],
        "body", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["n"], ["same"])],
        "other", [], [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )  # fmt: skip
    model = graph(
        [("Conv", "x w", "c", {}), norm("c", "n"), ("Conv", "x w2", "h", {}), norm("h", "m"),
         ("ReduceMin", "w2", "one", {"keepdims": 0}),
         ("Cast", "one", "yes", {"to": TensorProto.BOOL}),
         ("If", "yes", "y", {"then_branch": body, "else_branch": other})],
        {**CONV, "w2": random(5, 3, 3, 3), **norm_arrays(5)}, {"x": (2, 3, 6, 6)},
    )  # fmt: skip
    _, report = fold(model, (2, 3, 6, 6))
    assert report.folded == {"n": ["w"]}
    assert report.left["inner"] == "it is in a branch or a function"
    assert "If reads what it normalizes, too" in report.left["m"]


def test_several_in_a_row_and_names_that_stay():
    model = graph(
        [norm("x", "a"), ("Conv", "a w", "b", {}), norm("b", "c"), norm("c", "d"), norm("d", "y")],
        {"w": random(5, 5, 1), **norm_arrays(5)},
        {"x": ("n", 5, 6)},
    )
    folded, report = fold(model, (2, 5, 6))
    assert list(report.folded) == ["a", "c", "d", "y"]
    assert [(list(n.input)[:1], list(n.output)) for n in folded.graph.node] == [(["x"], ["y"])]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types(dtype):
    arrays = {"w": random(5, 4), "b": random(5), **norm_arrays(5)}
    nodes = [("Gemm", "x w b", "h", {"transB": 1}), norm("h", "y")]
    model = graph(nodes, arrays, {"x": (3, 4)}, dtype=dtype)
    folded, report = bn.fold(model, [random(3, 4).astype(dtype)])
    assert report.folded == {"y": ["w"]}
    assert {numpy_helper.to_array(t).dtype for t in folded.graph.initializer} == {np.dtype(dtype)}
    assert report.max_error <= (1e-2 if dtype is np.float16 else 1e-12)


def test_training_is_refused_and_so_is_a_wrong_example():
    arrays = {**CONV, **norm_arrays(5)}
    trains = ("BatchNormalization", norm("h", "y")[1], "y m v", {"training_mode": 1})
    nodes = [("Conv", "x w", "h", {}), trains]
    with pytest.raises(ValueError, match=r"'y m v' was exported in training mode.*model.eval\(\)"):
        bn.fold(graph(nodes, arrays, {"x": (2, 3, 6, 6)}), verify=False)
    nodes[1] = norm("h", "y")
    model = graph(nodes, arrays, {"x": (2, 3, 6, 6)})
    with pytest.raises(ValueError, match="brings no example inputs: pass the values"):
        bn.fold(model)
    with pytest.raises(ValueError, match="example has 2 values, and keywords has none: expected"):
        bn.fold(model, [1, 2])
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"keywords has .y.: expected one for .* .x."):
        bn.fold(model, keywords={"y": x})
    for example, keywords in ((x, {}), (None, {"x": x})):
        assert bn.fold(model, example, keywords=keywords)[1].folded == {"y": ["w"]}


def test_a_model_of_several_exported_as_it_is():
    pytest.importorskip("onnxscript")
    model = Model(
        lambda m, x: m.second(m.linear(m.first(torch.relu(m.norm(m.conv(x)))).flatten(2).mT)[:, 0]),
        conv=nn.Conv2d(3, 4, 3, bias=False), norm=bn.BatchNorm2d(4), first=nn.BatchNorm2d(4),
        linear=nn.Linear(4, 5, bias=False), second=nn.BatchNorm1d(5),
    )  # fmt: skip
    model, x = trained(model).float(), torch.randn(2, 3, 6, 6)
    program = exported(model, (x,))
    folded, report = bn.fold(program, x)
    assert report.folded.keys() == {"norm", "first"}
    assert report.left.keys() == {"second"}
    onnx.checker.check_model(folded, full_check=True)


@pytest.mark.parametrize(
    ("name", "count"), [("resnet", 12), ("levit", 27), ("regnet", 17), ("rt_detr", 42)]
)
def test_published_architectures(name, count):
    pytest.importorskip("onnxscript")
    model, example = make_architecture(name)
    folded, report = bn.fold(exported(model, example), example)
    assert (len(report.folded), report.left) == (count, {})
    assert report.max_error <= 1e-5
    onnx.checker.check_model(folded, full_check=True)
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)


def exported(model, example):
    """Return the ONNX model of a model, not optimized, which would fold some."""
    return torch.onnx.export(model, example, dynamo=True, optimize=False, verbose=False).model_proto
