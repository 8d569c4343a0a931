"""The floors of the design: an import only points down."""

import ast
import sys
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(batchnorm.__file__).parent

#: From the ground up. A floor may import itself and what stands before it.
FLOORS = (
    "reference", "positions", "moments", "half_life", "kernels", "functional", "layers", "models",
    "diagnose", "conventions", "keras", "lightning", "transformers", "environment", "study",
    "bench", "cli",
)  # fmt: skip

#: These stand side by side, and import nothing of each other.
SIDE_BY_SIDE = {"study", "bench"}

#: What a floor must not need, so that the core asks for torch and NumPy alone.
CORE = (
    "reference", "positions", "moments", "half_life", "kernels", "functional", "layers", "models",
    "diagnose", "conventions", "environment",
)  # fmt: skip

#: What a floor of the core uses where it is installed, and imports inside a function alone.
OPTIONAL = {
    "kernels": {"triton"},
    "models": {"onnx", "onnxruntime", "rich"},
    "diagnose": {"matplotlib", "onnx", "pandas"},
}

#: A folder that is imported inside a function alone, as a whole: all in it needs Triton.
PROGRAMS = "batchnorm.kernels.triton.programs"

#: The floors of another framework, named after it: nothing else imports that, or them.
FRAMEWORKS = {"keras", "lightning", "transformers"}


def floor_of(path):
    """Return the name of the floor a file is on; None for the package's own `__init__`."""
    return path.relative_to(ROOT).with_suffix("").parts[0] if path.parent != ROOT else path.stem


def imports_of(path):
    """Return every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute, so that they can be read"
            if node.module == "batchnorm":
                yield from (f"batchnorm.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_import_only_points_down(path):
    floor = floor_of(path)
    assert floor in FLOORS, f"{path} is on no floor"
    beside = FRAMEWORKS - {floor} | (SIDE_BY_SIDE - {floor} if floor in SIDE_BY_SIDE else set())
    allowed = [name for name in FLOORS[: FLOORS.index(floor) + 1] if name not in beside]
    public = {name for name in batchnorm.__all__ if home(name) in allowed}
    for module in imports_of(path):
        package, _, rest = module.partition(".")
        if floor in CORE and floor != "environment":  # the package as a whole is above them
            assert module != "batchnorm", f"{floor} imports all of batchnorm"
        if package == "batchnorm" and rest:
            name = rest.split(".")[0]
            assert name in allowed or name in public or name == "__version__", (
                f"{floor} imports batchnorm.{name}"
            )
        if floor in CORE:
            known = {*sys.stdlib_module_names, "numpy", "torch", "batchnorm"}
            assert package in known | OPTIONAL.get(floor, set())
        if floor == "reference":
            assert package not in {"torch", "batchnorm"}
        if floor == "half_life":
            assert package in {"__future__", "math"}
        assert package not in FRAMEWORKS or package == floor


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_optional_is_imported_inside_a_function(path):
    if ROOT / "kernels" / "triton" / "programs" in path.parents:
        return
    optional = OPTIONAL.get(floor_of(path), set())
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            for name in [node.module] if isinstance(node, ast.ImportFrom) else names:
                assert name.split(".")[0] not in optional
                assert not name.startswith(PROGRAMS)


def home(name):
    """Return the floor that a public name comes from."""
    return getattr(batchnorm, name).__module__.split(".")[1]


def test_every_floor_is_there():
    assert {floor_of(path) for path in FILES} == set(FLOORS)
