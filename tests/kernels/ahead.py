"""Compiles the programs of the backend in Triton for GPUs that need not be there.

    python tests/kernels/ahead.py cuda:80 cuda:90 hip:gfx942

Prints a line of JSON for each: the registers of a thread, what is spilled, how wide its loads are.
It runs in a process of its own, for Triton is either interpreted or compiled there.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchnorm import Moments
from batchnorm.kernels import Activation, Form, Given, Needs
from batchnorm.kernels.triton import backend, device, launches, plan, running

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "launch_cooperative_grid", "maxnreg", "enable_fp_fusion")
SMS = 132
#: Shape, memory format, mask and size of groups.
CASES = {
    "planar": ((32, 64, 56, 56), torch.contiguous_format, False, None),
    "interleaved": ((32, 256, 56, 56), torch.channels_last, False, None),
    "held, planar": ((128, 512, 7, 7), torch.contiguous_format, False, None),
    "held, interleaved": ((256, 1024), torch.contiguous_format, False, None),
    "one channel": ((64, 1, 9, 9), torch.contiguous_format, False, None),
    "one example": ((1, 64, 128, 128), torch.contiguous_format, False, None),
    "eight channels": ((64, 8, 32, 32), torch.channels_last, False, None),
    "masked": ((32, 64, 40, 40), torch.contiguous_format, True, None),
    "groups": ((32, 64, 56, 56), torch.channels_last, True, 8),
}


class Recorder:
    """Stands for a program, and notes what it is launched with."""

    def __init__(self, program, noted):
        self.program, self.noted = program, noted

    def __getitem__(self, grid):
        return lambda **given: self.noted.append((self.program, grid, given))


class Recorded:
    """Stands for the programs of a module."""

    def __init__(self, module, noted):
        self._module, self._noted = module, noted

    def __getattr__(self, name):
        return Recorder(getattr(self._module, name), self._noted)


def launches_of(shape, layout, masked, ghost_size, dtype, activation, cuts=None):
    """Return program, grid and arguments of all launches that a batch makes, and launch nothing."""
    noted = []
    modules, cut = device.programs(), launches.cut_of
    recorded = tuple(Recorded(module, noted) for module in modules)
    launches.programs = running.programs = lambda: recorded
    if cuts is not None:
        backend.cut_of = lambda batch, x, work="", run=None: (
            cuts(batch, x.element_size()) if work else cut(batch, x)
        )
    try:
        x = torch.empty(shape, dtype=dtype).contiguous(memory_format=layout)
        channels = shape[1]
        numbers = torch.empty(channels)
        mask = torch.empty((shape[0], 1, *shape[2:])) if masked else None
        form = Form(activation=Activation.parse(activation), ghost_size=ghost_size)
        one = backend.Triton()
        found = one.forward(x, numbers, numbers, x.clone(), mask, form, None)
        given = Given(x, found.mean, found.inverse_std, numbers, numbers, x.clone(), mask, form)
        one.backward(x.clone(), given, found.moments.count, Needs())
        one.forward(x, numbers, numbers, None, None, form, (numbers, numbers))
        wide = found.mean.new_empty(channels)
        tracked = torch.zeros((), dtype=torch.int64)
        running.move(numbers, numbers, Moments(7, wide, wide), 0.1, tracked)
    finally:
        launches.programs = running.programs = device.programs
        backend.cut_of = cut
    return noted


def source_of(program, given):
    """Return a program with the types of what it is launched with."""
    signature, constants, known = {}, {}, {}
    for at, parameter in enumerate(program.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[at,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            known[at,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                known[at,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(program, signature, constants, known)


def target_of(name):
    """Return what Triton calls a GPU: `cuda:90`, or `hip:gfx942`."""
    kind, _, which = name.partition(":")
    return GPUTarget(kind, int(which), 32) if kind == "cuda" else GPUTarget(kind, which, 64)


def described(compiled):
    """Return what a compiled program takes, and in how many bytes it loads: ahead, or at once."""
    if "ptx" not in compiled.asm:
        return {}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    ptx = compiled.asm["ptx"]
    wide = {
        f"{n or 1}x{bits}" for n, bits in re.findall(r"ld\.global\S*?\.(?:v(\d)\.)?b(\d+)", ptx)
    }
    ahead = re.findall(r"cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    return {
        **dict(zip(("registers", "spilled"), map(int, numbers.groups()), strict=True)),
        "shared": compiled.metadata.shared,
        "loads": sorted(wide),
        "ahead": sorted({int(size, 0) for size in ahead}),
    }


def main(targets):
    """Compile everything for the targets."""
    launches.multiprocessors = lambda _: SMS
    backend.is_interpreted = lambda: True  # as far as tensors on the CPU are concerned

    def together(batch, itemsize):
        return plan.shared(batch, itemsize, SMS, plan.HELD) or plan.reckoned(
            batch, itemsize, SMS, 0
        )

    tasks = [
        (f"{name}, {TYPES[dtype]}", (*case, dtype, activation), None)
        for (name, case), (dtype, activation) in itertools.product(
            CASES.items(), ((torch.bfloat16, "relu"), (torch.float32, "gelu"))
        )
    ]
    tasks.append(("held together", (*CASES["planar"], torch.bfloat16, "relu"), together))
    tasks.append(("held together", (*CASES["interleaved"], torch.bfloat16, "relu"), together))
    tasks.append(("planar, fp16", (*CASES["planar"], torch.float16, "tanh"), None))
    tasks.append(("planar, fp64", (*CASES["planar"], torch.float64, "silu"), None))
    tasks.append(("far, planar", (*CASES["planar"], torch.bfloat16, "relu"), None))
    tasks.append(("far, groups", (*CASES["groups"], torch.bfloat16, "relu"), None))
    near = launches.is_far
    for name, case, cuts in tasks:
        launches.is_far = (lambda *_: True) if name.startswith("far") else near
        for program, grid, given in launches_of(*case, cuts):
            if given.get("PROGRAMS", 1) > 1:
                given["launch_cooperative_grid"] = True
            for target in targets:
                options = {key: given[key] for key in OPTIONS if key in given}
                if target.startswith("cuda"):
                    options["maxnreg"] = device.REGISTERS
                compiled = triton.compile(
                    source_of(program, given), target=target_of(target), options=options
                )
                row = {
                    "case": name,
                    "program": program.fn.__name__,
                    "target": target,
                    "programs": grid[0],
                    "warps": given["num_warps"],
                    **described(compiled),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["cuda:90"])
