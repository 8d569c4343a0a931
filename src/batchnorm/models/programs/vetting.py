"""What may stand in a program that is about to be loaded: nothing that could run.

`torch.export.load` unpickles what an archive asks it to, loads libraries that lie in it, and makes
source code of its text: operators are looked up by name, shapes and guards are evaluated as
expressions, names of nodes and arguments become those of a Python function. So all text is looked
at before. What is not known to be harmless is refused; nothing is repaired.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from batchnorm.models.files import FileError

#: A name in the code that is made of a program; empty where there is none.
_NAME = re.compile(r"([A-Za-z_]\w*)?", re.ASCII)
#: A path of attributes, in quotes in that code where it is no name.
_PATH = re.compile(r"[\w.\-/: ]*", re.ASCII)
#: The text of an argument, which may stand in quotes in an expression.
_TEXT = re.compile(r"[^'\"\\{}]*", re.ASCII)
#: The arguments of operators that are sentences.
_MESSAGES = ("assert_msg", "message")
#: The signs of an expression, on one line and without a comment.
_SIGNS = re.compile(r"[\w \[\]'().,<>=!*+/%&|-]*", re.ASCII)
#: Any other text that is expected: a device, a version, an infinite number.
_WORD = re.compile(r"[\w.+\-:]*", re.ASCII)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond|while_loop)"
    r"|torch\._?sym_(int|float|max|min|not|ite|sqrt|sum|fresh_size)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_"
    r"|not_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt)",
    re.ASCII,
)
#: Calls in the expressions of shapes, as SymPy and torch write them.
_FUNCTIONS = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|Mod|Equality|Unequality|GreaterThan"
    "|LessThan|StrictGreaterThan|StrictLessThan|Eq|Ne|Ge|Le|Gt|Lt|And|Or|Not|FloorDiv"
    "|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|IntTrueDiv"
    "|FloatTrueDiv|LShift|RShift|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt"
    "|RoundToInt|RoundDecimal|ToFloat|FloatPow|PowByNatural|Identity"
)
_CONSTANTS = frozenset(("true", "false", "oo", "int_oo", "inf", "math", "L"))
_LITERALS = frozenset(("Symbol", "Integer", "Float"))
_METHODS = frozenset(("size", "stride", "storage_offset", "isnan", "inf", "floor", "ceil", "trunc"))
_ARITHMETIC: tuple[type[ast.AST], ...] = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript,
    ast.Name, ast.Attribute, ast.Call, ast.Constant, ast.keyword, ast.operator, ast.unaryop,
    ast.boolop, ast.cmpop, ast.expr_context, ast.Tuple,
)  # fmt: skip
_DEEPEST = 50


def vet(content: Any) -> None:
    """Look through what an archive's JSON says.

    Args:
        content: The parsed JSON: of a program, or of where its tensors are.

    Raises:
        FileError: Something in it could run, or is not known.
    """
    _vet(content, "", 0)


def _vet(value: Any, key: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise FileError("it is nested too deeply")
    if isinstance(value, dict):
        if key == "metadata":  # notes of the exporter, which become neither names nor code
            return
        for inner, content in value.items():
            if inner in _NEVER and content not in (None, {}, [], False):
                raise FileError(_NEVER[inner])
            if key != "range_constraints":  # whose keys are only compared
                _match(_PATH, inner, "the key")
            if not (inner == "arg" and value.get("name") in _MESSAGES and _is_text(content)):
                _vet(content, inner, depth + 1)
    elif isinstance(value, list):
        for content in value:
            _vet(content, key, depth + 1)
    elif isinstance(value, str):
        _RULES.get(key, _word)(value)


def _is_text(content: Any) -> bool:
    """Return whether an argument is text and nothing else: of an operator, which is quoted."""
    return isinstance(content, dict) and set(content) == {"as_string"}


def _match(pattern: re.Pattern[str], text: str, what: str) -> None:
    if pattern.fullmatch(text) is None:
        raise FileError(f"{what} {text[:60]!r} could become code")


def _name(text: str) -> None:
    _match(_NAME, text, "the name")


def _path(text: str) -> None:
    _match(_PATH, text, "the name")


def _word(text: str) -> None:
    _match(_WORD, text, "the text")


def can_be_quoted(text: str) -> bool:
    """Return whether text in quotes is text and nothing else."""
    return text.isprintable() and _TEXT.fullmatch(text) is not None


def _text(text: str) -> None:
    if not can_be_quoted(text):
        raise FileError(f"the text {text[:60]!r} could become code")


def _operator(text: str) -> None:
    """Refuse what is not one of torch's operators, and those of them that open files."""
    import torch

    if _OPERATOR.fullmatch(text) is None:
        raise FileError(f"the operator {text[:60]!r} is none of torch's own")
    if text.startswith(("torch.ops.aten.", "torch.ops.prims.")):
        *_, space, name, overload = text.split(".")
        found = getattr(getattr(getattr(torch.ops, space), name, None), overload, None)
        if not isinstance(found, torch._ops.OpOverload):
            raise FileError(f"this version of torch has no operator {text[:60]!r}")
        if any(argument.name == "filename" for argument in found._schema.arguments):
            raise FileError(f"the operator {text!r} opens files")


def _expression(text: str) -> None:
    """Refuse an expression that is more than arithmetic on symbols and the sizes of inputs."""
    _match(_SIGNS, text, "the expression")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FileError(f"the expression {text[:60]!r} is none") from None
    literals = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _LITERALS
        and node.args
    }
    keys = {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        fine = isinstance(node, _ARITHMETIC)
        if isinstance(node, ast.Name):
            fine = node.id in _CONSTANTS or _FUNCTIONS.fullmatch(node.id) is not None
        elif isinstance(node, ast.Attribute):
            fine = node.attr in _METHODS
        elif isinstance(node, ast.Call):
            fine = isinstance(node.func, ast.Name | ast.Attribute)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            wanted = _NAME if id(node) in keys else _WORD
            fine = id(node) in literals | keys and wanted.fullmatch(node.value) is not None
        elif isinstance(node, ast.Constant):
            fine = node.value is None or isinstance(node.value, bool | int | float)
        if not fine:
            raise FileError(f"the expression {text[:60]!r} is more than arithmetic")


def _tree(text: str, *, named: bool = False) -> None:
    """Refuse a description of arguments or results that imports modules, or has keys for code.

    Args:
        text: The description, as `torch.utils._pytree.treespec_dumps` writes it.
        named: Whether its keys become names in code.
    """
    _, spec = json.loads(text)

    def walk(node: Any, depth: int) -> None:
        if depth > _DEEPEST:
            raise FileError("its arguments or results are nested too deeply")
        if node["type"] is not None:
            _match(_PATH, node["type"], "the type")
        if node["type"] == "collections.defaultdict":
            raise FileError("its arguments or results have a defaultdict, which imports a module")
        context = node["context"]
        if isinstance(context, str):
            context = json.loads(context)
        _vet_context(context, named)
        for child in node["children_spec"]:
            walk(child, depth + 1)

    walk(spec, 0)


def _vet_context(value: Any, named: bool) -> None:
    if isinstance(value, dict):
        if "__enum__" in value:
            raise FileError("its arguments or results have an enumeration, which imports a module")
        for key, content in value.items():
            _vet_context(key, named)
            _vet_context(content, named)
    elif isinstance(value, list):
        for content in value:
            _vet_context(content, named)
    elif isinstance(value, str) and named:
        _name(value)


#: What text may be, by the key that it stands under.
_RULES: dict[str, Callable[[str], None]] = {
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _name),
    **dict.fromkeys(
        ("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn"), _path
    ),
    **dict.fromkeys(("target", "as_operator"), _operator),
    **dict.fromkeys(("expr_str", "guards_code"), _expression),
    **dict.fromkeys(("as_string", "as_strings"), _text),
    "in_spec": lambda text: _tree(text, named=True),
    "out_spec": _tree,
}

#: What is refused wherever it stands.
_NEVER = {
    "use_pickle": "it has pickled tensors, whose loading could run code",
    "custom_obj": "it has objects of other classes, whose loading could run code",
    "as_custom_obj": "it has objects of other classes, whose loading could run code",
    "custom_obj_values": "it has objects of other classes, whose loading could run code",
}
