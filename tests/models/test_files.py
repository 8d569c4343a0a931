"""Model files: what is in them does not run, and they are written whole."""

import contextlib
import io
import json
import logging
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models.exported import SHAPE, batch_may_vary, onnx_bytes, program_bytes, records, tampered
from torch import nn

from batchnorm.models import files
from batchnorm.models.files import FileError


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "net.pt2"
    path.write_bytes(program_bytes())
    return path


@pytest.fixture
def graph(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(onnx_bytes())
    return path


class TestWhatIsReadIsWrittenAgain:
    def test_a_program(self, program):
        x = torch.randn(5, *SHAPE)
        expected = torch.export.load(program).module()(x)
        read = files.read(program)
        assert torch.equal(read.module()(x), expected)
        files.write(program.with_name("again.pt2"), read)
        again = torch.export.load(program.with_name("again.pt2"))
        assert torch.equal(again.module()(x), expected)
        assert torch.equal(again.example_inputs[0][0], read.example_inputs[0][0])

    def test_what_else_was_saved_with_it(self, tmp_path):
        path = tmp_path / "named.pt2"
        with path.open("wb") as file:
            torch.export.save(batch_may_vary(nn.ReLU()), file, extra_files={"classes": "a b"})
        files.write(path, files.read(path))
        found = {"classes": ""}
        torch.export.load(path, extra_files=found)
        assert found == {"classes": "a b"}

    def test_shapes_that_vary_and_guards(self, tmp_path):
        class Cut(nn.Module):
            def forward(self, x, *, scale=2.0, shift=None):
                first, second = nn.functional.pad(x, (0, 1))[..., ::2].chunk(2)
                with torch.no_grad():
                    first = first + 1
                y = torch.cat([first, second[: first.shape[0]]]) * scale
                return {"y": y if shift is None else y + shift, "sizes": [x.shape[0], None]}

        batch, size = torch.export.Dim("batch", min=2), torch.export.Dim("size", min=3, max=64)
        made = torch.export.export(
            Cut(),
            (torch.randn(6, 9),),
            {"shift": torch.ones(1)},
            dynamic_shapes={"x": {0: 2 * batch, 1: size}, "shift": None},
        )
        path, x = tmp_path / "cut.pt2", torch.randn(8, 7)
        torch.export.save(made, path)
        assert json.loads(records(path.read_bytes())["models/model.json"])["guards_code"]
        read = files.read(path)
        expected = made.module()(x, shift=torch.ones(1))
        actual = read.module()(x, shift=torch.ones(1))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        with pytest.raises(Exception, match=r"size|Guard|constraint"):
            read.module()(torch.randn(8, 65), shift=torch.ones(1))

    def test_results_of_other_packages(self, tmp_path, monkeypatch):
        """Those of Transformers, where Transformers is not imported."""
        path = tmp_path / "net.pt2"

        def change(contents, program):
            entry = program["graph_module"]["module_call_graph"][0]["signature"]
            spec = json.loads(entry["out_spec"])
            spec[1] = {
                "type": "elsewhere.Output",
                "context": '["logits"]',
                "children_spec": [spec[1]],
            }
            entry["out_spec"] = json.dumps(spec)

        path.write_bytes(tampered(change))
        with pytest.raises(RuntimeError):
            torch.export.load(path)
        read, x = files.read(path), torch.randn(3, *SHAPE)
        (logits,) = read.module()(x)
        assert logits.shape == (3, 10)
        files.write(path, read)
        (again,) = files.read(path).module()(x)
        assert torch.equal(again, logits)

    def test_onnx(self, graph):
        files.write(graph.with_name("again.onnx"), files.read(graph))
        assert onnx.load(graph.with_name("again.onnx")) == onnx.load(graph)

    def test_onnx_with_weights_beside_it(self, graph):
        path = graph.with_name("apart.onnx")
        save_apart(graph, path, "w.bin")
        read = files.read(path)
        assert not any(tensor.external_data for tensor in read.graph.initializer)
        for ours, theirs in zip(
            read.graph.initializer, onnx.load(graph).graph.initializer, strict=True
        ):
            np.testing.assert_array_equal(
                onnx.numpy_helper.to_array(ours), onnx.numpy_helper.to_array(theirs)
            )


def save_apart(graph, path, location):
    """Save an ONNX model with its weights in another file."""
    model = onnx.load(graph)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)


class Touch:
    """What makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(path):
    file = io.BytesIO()
    torch.save(Touch(path), file)
    return file.getvalue()


def touching(path):
    return f"__import__('pathlib').Path({str(path)!r}).touch()"


def weight(contents, program, path):
    config = json.loads(contents["data/weights/model_weights_config.json"])
    next(iter(config["config"].values()))["use_pickle"] = True
    contents["data/weights/model_weights_config.json"] = json.dumps(config).encode()
    contents["data/weights/weight_0"] = pickled(path)


def example(contents, program, path):
    contents["data/sample_inputs/model.pt"] = pickled(path)


def old_weights(contents, program, path):
    contents["data/weights/model.pt"] = pickled(path)


def constant(kind, use_pickle):
    def change(contents, program, path):
        entry = {"path_name": f"{kind}_0", "is_param": False, "use_pickle": use_pickle}
        config = {"config": {"k": {**entry, "tensor_meta": None}}}
        contents["data/constants/model_constants_config.json"] = json.dumps(config).encode()
        contents[f"data/constants/{kind}_0"] = pickled(path)

    return change


def library(contents, program, path):
    contents["data/aotinductor/model/model.so"] = b"\x7fELF"


def another_program(contents, program, path):
    contents["models/other.json"] = contents["models/model.json"]


def size(contents, program, path):
    for meta in program["graph_module"]["graph"]["tensor_values"].values():
        if meta["sizes"] and "as_expr" in meta["sizes"][0]:
            meta["sizes"][0]["as_expr"]["expr_str"] = touching(path)


def guard(contents, program, path):
    program["guards_code"] = [touching(path) + " is None"]


def guard_after_a_comment(contents, program, path):
    program["guards_code"] = [f"1 #\n,{touching(path)})"]


def argument_name(contents, program, path):
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"x={touching(path)}"]


def node_name(contents, program, path):
    """Rename the input, wherever it is named."""
    text = json.dumps(program["graph_module"]).replace('"x"', json.dumps(f"x={touching(path)}"))
    program["graph_module"] = json.loads(text)


def buffer_name(contents, program, path):
    for spec in program["graph_module"]["signature"]["input_specs"]:
        if "buffer" in spec:
            spec["buffer"]["buffer_name"] = f'a-", {touching(path)}, "'


def operator(target, *strings):
    def change(contents, program, path):
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"] = target
        node["inputs"] = [
            {"name": "", "arg": {"as_string": text.format(path)}, "kind": 1} for text in strings
        ]

    return change


def constant_in_quotes(contents, program, path):
    graph = program["graph_module"]["graph"]
    graph["inputs"].append({"as_string": f"' or {touching(path)} or '"})


def tree(spec):
    """Let the description of the results be another one."""

    def change(contents, program, path):
        (path.parent / "touching_module.py").write_text(f"import os; os.mkdir({str(path)!r})")
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, {**spec, "children_spec": []}])

    return change


ENUM = {
    "type": "builtins.dict",
    "context": json.dumps([{"__enum__": True, "fqn": "touching_module:A", "name": "b"}]),
}
DEFAULT = {
    "type": "collections.defaultdict",
    "context": {
        "default_factory_module": "touching_module",
        "default_factory_name": "x",
        "dict_context": [],
    },
}

#: What is done to a file, whether torch.export.load then runs it, and what is said of it here.
ATTACKS = {
    "a pickled weight": (weight, True, "pickled tensors"),
    "pickled example inputs": (example, True, "example inputs are pickled"),
    "weights of an old version": (old_weights, True, "data/weights/model.pt"),
    "an opaque object": (constant("opaque_obj", True), False, "pickled"),
    "an opaque object, said not to be": (constant("opaque_obj", False), False, "opaque_obj_0"),
    "a scripted object": (constant("custom_obj", True), False, "pickled"),
    "a pickled constant": (constant("tensor", True), True, "pickled tensors"),
    "a library": (library, False, "model.so"),
    "another program": (another_program, False, "models/other.json"),
    "a size": (size, True, "the expression"),
    "a guard": (guard, True, "the expression"),
    "a guard after a comment": (guard_after_a_comment, False, "the expression"),
    "the name of an argument": (argument_name, False, "the name"),
    "the name of a node": (node_name, True, "the name"),
    "the name of a buffer": (buffer_name, False, "the name"),
    "a function of torch": (operator("torch.load", "{}"), False, "none of torch's own"),
    "a library by an operator": (operator("torch.ops.load_library", "{}"), False, "torch's own"),
    "an operator that opens files": (
        operator("torch.ops.aten.from_file.default", "{}"), False, "opens files",
    ),
    "an operator of another package": (operator("#other:op"), False, "none of torch's own"),
    "a constant in quotes": (constant_in_quotes, False, "the text"),
    "an enumeration": (tree(ENUM), True, "an enumeration"),
    "a default": (tree(DEFAULT), True, "a defaultdict"),
}  # fmt: skip


def texts(content):
    """Return where in JSON there is text, once for each kind of place, keys included."""
    found = {}

    def walk(value, place, kind):
        if isinstance(value, dict):
            for key, inner in value.items():
                found.setdefault((*kind, "key"), (*place, (key,)))
                walk(inner, (*place, key), (*kind, key))
        elif isinstance(value, list):
            for at, inner in enumerate(value):
                walk(inner, (*place, at), (*kind, "*"))
        elif isinstance(value, str):
            found.setdefault(kind, place)

    walk(content, (), ())
    return list(found.values())


def put(content, place, text):
    """Put text into a place; one that ends with a tuple is a key."""
    *outer, last = place
    for part in outer:
        content = content[part]
    if isinstance(last, tuple):
        content[text] = content.pop(last[0])
    else:
        content[last] = text


class TestUntrustedPrograms:
    @pytest.mark.parametrize("attack", ATTACKS)
    def test_nothing_in_them_runs(self, tmp_path, attack, monkeypatch, caplog):
        change, _, said = ATTACKS[attack]
        marker, path = tmp_path / "marker", tmp_path / "bad.pt2"
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "touching_module", raising=False)
        path.write_bytes(tampered(lambda c, p: change(c, p, marker)))
        with pytest.raises(FileError) as refused:
            files.read(path)
        assert not marker.exists()
        message = str(refused.value)
        assert message.startswith(f"{path}: ")
        assert said in message
        assert "\n" not in message
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    @pytest.mark.parametrize("attack", [name for name, (_, runs, _) in ATTACKS.items() if runs])
    def test_torch_runs_it(self, tmp_path, attack, monkeypatch, caplog):
        """So that the test above is of something."""
        change, _, _ = ATTACKS[attack]
        marker, path = tmp_path / "marker", tmp_path / "bad.pt2"
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "touching_module", raising=False)
        path.write_bytes(tampered(lambda c, p: change(c, p, marker)))
        with contextlib.suppress(Exception):  # after it has run
            torch.export.load(path).module()(torch.randn(2, *SHAPE))
        assert marker.exists()

    @pytest.mark.parametrize("quote", ["{}", "' + str({}) + '"])
    def test_no_text_in_them_runs(self, tmp_path, quote):
        """Whatever text it is in place of: each is tried, but for those of one kind."""
        path, marker = tmp_path / "bad.pt2", tmp_path / "marker"
        bad = quote.format(f"__import__('os').mkdir({str(marker)!r})")
        tried, ran = texts(json.loads(records(program_bytes())["models/model.json"])), 0
        for place in tried:
            path.write_bytes(tampered(lambda _, program, place=place: put(program, place, bad)))
            with contextlib.suppress(FileError):
                module = files.read(path).module()
                ran += 1
                with contextlib.suppress(Exception):
                    module(torch.randn(2, *SHAPE))
            assert not marker.exists(), place
        assert len(tried) > 50
        assert ran < 20  # notes of the exporter, most of all

    def test_an_archive_of_two_years_ago(self, tmp_path):
        """Whose reader unpickles what it has."""
        path, marker = tmp_path / "old.pt2", tmp_path / "marker"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("version", "8.20")
            archive.writestr("serialized_state_dict.pt", pickled(marker))
        with pytest.raises(FileError, match="export it again"):
            files.read(path)
        assert not marker.exists()

    def test_a_pickle(self, tmp_path):
        path, marker = tmp_path / "pickle.pt2", tmp_path / "marker"
        path.write_bytes(pickled(marker))
        with pytest.raises(FileError):
            files.read(path)
        assert not marker.exists()

    @pytest.mark.parametrize("size", [0, 10, 5_000])
    def test_a_part_of_one(self, program, size):
        program.write_bytes(program.read_bytes()[:size])
        with pytest.raises(FileError, match=r"net.pt2: .*: it cannot be read; export it again"):
            files.read(program)


class TestUntrustedOnnx:
    @pytest.mark.parametrize(
        "location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "C:\\w.bin", ""]
    )
    def test_weights_lie_beside_it(self, graph, location):
        path = graph.parent / "folder" / "apart.onnx"
        path.parent.mkdir()
        save_apart(graph, path, "w.bin")
        shutil.move(path.parent / "w.bin", graph.parent)
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        path.write_bytes(model.SerializeToString())
        with pytest.raises(FileError, match=r"apart.onnx: it keeps weights in .*beside it"):
            files.read(path)

    def test_in_one_place_each(self, graph):
        """Others read the last that is named, and not the first."""
        path = graph.parent / "apart.onnx"
        save_apart(graph, path, "w.bin")
        model = onnx.load(path, load_external_data=False)
        model.graph.initializer[0].external_data.add(key="location", value="../elsewhere")
        path.write_bytes(model.SerializeToString())
        with pytest.raises(FileError, match=r"apart.onnx: it keeps .* in 2 files: expected one"):
            files.read(path)

    def test_not_behind_a_link(self, graph):
        path = graph.parent / "folder" / "apart.onnx"
        path.parent.mkdir()
        save_apart(graph, path, "w.bin")
        shutil.move(path.parent / "w.bin", graph.parent)
        (path.parent / "w.bin").symlink_to(graph.parent / "w.bin")
        with pytest.raises(FileError, match="a link to another folder"):
            files.read(path)

    def test_nor_nowhere(self, graph):
        path = graph.with_name("apart.onnx")
        save_apart(graph, path, "w.bin")
        graph.with_name("w.bin").unlink()
        with pytest.raises(FileError, match=r"'w\.bin', which does not lie beside it"):
            files.read(path)

    def test_also_those_in_nodes(self, tmp_path):
        tensor = onnx.numpy_helper.from_array(np.ones(3, np.float32), "k")
        onnx.external_data_helper.set_external_data(tensor, "../w.bin")
        tensor.ClearField("raw_data")
        node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
        info = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3])
        graph = onnx.helper.make_graph([node], "g", [], [info])
        path = tmp_path / "constant.onnx"
        path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
        with pytest.raises(FileError, match=r"it keeps weights in '\.\./w.bin'"):
            files.read(path)

    @pytest.mark.parametrize("content", [b"", b"an ONNX file", bytes(100)])
    def test_something_else(self, tmp_path, content):
        path = tmp_path / "else.onnx"
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"else.onnx: "):
            files.read(path)


class TestWriting:
    def test_nothing_is_left_of_what_failed(self, program):
        out, before = program.with_name("out.pt2"), files.read(program)
        out.write_text("as it was")

        def check(written):
            assert len(list(out.parent.iterdir())) == 3
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            files.write(out, before, check)
        assert out.read_text() == "as it was"
        assert {path.name for path in out.parent.iterdir()} == {"net.pt2", "out.pt2"}

    def test_what_is_checked_is_what_is_written(self, program):
        seen = []
        files.write(program.with_name("out.pt2"), files.read(program), seen.append)
        (written,) = seen
        assert written.state_dict.keys() == files.read(program).state_dict.keys()

    def test_a_folder_that_cannot_be_written_to(self, program):
        model, out = files.read(program), program.parent / "none" / "out.pt2"
        with pytest.raises(FileError, match=r"out.pt2: .*; name a file in a folder"):
            files.write(out, model)

    @pytest.mark.parametrize(
        ("model", "out", "said"),
        [
            ("a.pt2", "b.onnx", "--out b.onnx: expected a .pt2 file, as a.pt2 is one"),
            ("a.pt", "b.pt", "a.pt: expected a name that ends in .pt2"),
            ("a.pt2", "b", "b: expected a name that ends in .pt2"),
            ("a.onnx", "none/b.onnx", "--out none/b.onnx: none is no folder"),
        ],
    )
    def test_names_that_do_not_go_together(self, model, out, said):
        with pytest.raises(FileError) as refused:
            files.check_paths(Path(model), Path(out))
        assert str(refused.value).startswith(said)

    def test_names_that_could_steer_a_terminal(self, tmp_path):
        with pytest.raises(FileError) as refused:
            files.read(tmp_path / "\x1b[2J\n.pt2")
        assert str(refused.value).isprintable()
