"""Small models in files, as exporters write them, and files with something bad in them."""

import functools
import io
import json
import logging
import warnings
import zipfile

import torch
from torch import nn

#: What calls of the model take.
SHAPE = (1, 8, 8)


class Net(nn.Module):
    """A small network for the digits, with a 2d and a 1d batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 10)
        self.last = nn.BatchNorm1d(10)

    def forward(self, x):
        x = self.body(self.bn(self.conv(x))).relu()
        return self.last(self.fc(x.mean((2, 3))))


def trained(model):
    """Return a model in evaluation, whose batch norms are not as they are made."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.3)
                if module.track_running_stats:
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 2)
    return model.eval()


def net():
    """Return the small network, the same each time."""
    torch.manual_seed(0)
    return trained(Net())


def batch_may_vary(model):
    """Return the program of a model that takes pictures of the digits' size, any number of them."""
    batch = torch.export.Dim("batch")
    example = torch.randn(2, *SHAPE)
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


@functools.cache
def program_bytes(dynamic=True):
    """Return the file that `torch.export.save` writes of the small network."""
    model = net()
    program = (
        batch_may_vary(model) if dynamic else torch.export.export(model, (torch.randn(2, *SHAPE),))
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


@functools.cache
def onnx_bytes():
    """Return the file that `torch.onnx.export` writes of the small network."""
    return onnx_of(net()).SerializeToString()


def onnx_of(model):
    """Return what `torch.onnx.export` makes of a model of pictures of the digits, unoptimized."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch itself calls
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        exported = torch.onnx.export(
            model,
            (torch.randn(2, *SHAPE),),
            input_names=["x"],
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            optimize=False,  # which would fold
            verbose=False,
        )
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    return exported.model_proto


def records(content):
    """Return what is in an archive, by its path in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def archive_of(contents):
    """Return an archive of records."""
    from torch.export.pt2_archive import PT2ArchiveWriter

    file = io.BytesIO()
    with PT2ArchiveWriter(file) as writer:
        for name, content in contents.items():
            if name not in ("byteorder", "version") and not name.startswith(".data/"):
                writer.write_bytes(name, content)
    return file.getvalue()


def tampered(change, content=None):
    """Return the file of the small network after a change.

    Args:
        change: Is given the records, and the parsed program; changes them.
        content: The file, if it is another one.
    """
    contents = records(content or program_bytes())
    program = json.loads(contents["models/model.json"])
    change(contents, program)
    contents["models/model.json"] = json.dumps(program).encode()
    return archive_of(contents)
