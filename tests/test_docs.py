"""The documentation held to the sources: every public name, every example, every link."""

import ast
import builtins
import dataclasses
import functools
import inspect
import os
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from types import FunctionType, ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import batchnorm as bn

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if path.exists())


def public_names():
    """Return name -> (object, the class it is defined in or None), for all that users see."""
    found = {}
    for name in bn.__all__:
        found[name] = getattr(bn, name), None
        if inspect.isclass(found[name][0]):
            owner = found[name][0]
            for member, value in vars(owner).items():
                if not member.startswith("_") and _is_method(value):
                    method = value.fget if isinstance(value, property) else getattr(owner, member)
                    found[f"{name}.{member}"] = method, owner
    return found


def _is_method(value):
    return isinstance(value, (FunctionType, classmethod, staticmethod, property))


PUBLIC = public_names()
#: What needs a framework to be imported.
FRAMEWORKS = (
    "keras.BatchNormalization",
    "lightning.BatchNormCallback",
    "transformers.BatchNormCallback",
)


class TestDocstrings:
    """Rule: one line; Args, Returns and Raises where there are any; an example that runs."""

    @pytest.mark.parametrize("name", PUBLIC)
    def test_begins_with_one_line(self, name):
        first, *rest = inspect.getdoc(PUBLIC[name][0]).splitlines()
        assert first.endswith(".")
        assert not rest or rest[0] == ""

    @pytest.mark.parametrize("name", PUBLIC)
    def test_names_every_argument(self, name):
        thing, owner = PUBLIC[name]
        if _is_known_from_a_base(thing, owner):
            return
        sections = _sections(thing)
        described = _entries(sections.get("Args", "") + sections.get("Attributes", ""))
        assert described == _parameters(thing)

    @pytest.mark.parametrize("name", PUBLIC)
    def test_says_what_is_returned(self, name):
        thing, owner = PUBLIC[name]
        if inspect.isclass(thing) or _is_known_from_a_base(thing, owner):
            return
        returned = inspect.signature(thing).return_annotation
        if returned not in (None, "None", "Iterator[None]"):
            assert "Returns" in _sections(thing) or inspect.getdoc(thing).startswith("Return ")

    @pytest.mark.parametrize("name", PUBLIC)
    def test_names_every_exception(self, name):
        thing, owner = PUBLIC[name]
        raised = _raised(thing.__init__ if inspect.isclass(thing) else thing, owner or thing)
        if inspect.isclass(thing) and "__init__" not in vars(thing):
            return
        assert raised <= set(_entries(_sections(thing).get("Raises", "")))

    @pytest.mark.parametrize("name", PUBLIC)
    def test_has_an_example(self, name):
        thing, owner = PUBLIC[name]
        if not _is_known_from_a_base(thing, owner):
            assert ">>> " in _sections(thing).get("Example", "")


def _sections(thing):
    """Return title -> text of the sections of a docstring."""
    found = re.split(r"^(\w+):$", inspect.getdoc(thing), flags=re.MULTILINE)
    return {
        title: textwrap.dedent(text) for title, text in zip(found[1::2], found[2::2], strict=True)
    }


def _entries(section):
    return re.findall(r"^(\w+):", textwrap.dedent(section), flags=re.MULTILINE)


def _parameters(thing):
    if hasattr(thing, "_fields"):  # a NamedTuple
        return list(thing._fields)
    if inspect.isclass(thing) and not {"__init__", "__dataclass_fields__"} & set(vars(thing)):
        return []  # the class that it extends documents them
    if dataclasses.is_dataclass(thing):
        return [f.name for f in dataclasses.fields(thing) if not f.name.startswith("_")]
    return [name for name in inspect.signature(thing).parameters if name != "self"]


def _is_known_from_a_base(method, owner):
    """Return whether it takes what a method of that name of another package takes."""
    for base in owner.__mro__[1:] if owner else ():
        known = vars(base).get(method.__name__)
        if known is not None and not base.__module__.startswith("batchnorm"):
            return list(inspect.signature(known).parameters) == list(
                inspect.signature(method).parameters
            )
    return False


@functools.cache
def _raised(function, owner):
    """Return the names of the exceptions that a function of the package raises or lets through."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, FunctionType) or not function.__module__.startswith("batchnorm"):
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # written by dataclasses
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(node.exc.func.id)
        if isinstance(node, ast.Call):
            called = _resolve(node.func, function.__globals__, owner)
            if called is not None and called is not function:
                found |= _raised(called, getattr(called, "__self__", owner))
    return frozenset(found)


def _resolve(node, names, owner):
    """Return the function that is called by a name or an attribute, where that can be read."""
    if isinstance(node, ast.Name):
        if node.id in ("self", "cls"):
            return owner
        return names.get(node.id, getattr(builtins, node.id, None))
    if isinstance(node, ast.Attribute):
        base = _resolve(node.value, names, owner)
        if isinstance(base, ModuleType) or inspect.isclass(base):
            return getattr(base, node.attr, None)
    return None


BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_without_prompts_runs(path, tmp_path, monkeypatch):
    """What has prompts is a doctest, and run as one."""
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    names = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        if ">>> " not in block["code"]:
            above = "\n" * text[: block.start("code")].count("\n")  # so that errors have its line
            exec(compile(above + block["code"], path, "exec"), names)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files(path):
    text = re.sub(r"```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not urlsplit(target).scheme:
            assert (path.parent / target).exists(), target


class Page(HTMLParser):
    """A built page: the names it documents, its anchors, its links, what it loads, its text."""

    def __init__(self, path):
        super().__init__()
        self.names, self.anchors, self.links, self.loads = set(), set(), [], []
        self.mathematics, self.prose = [], []
        self._inside = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if "doc-heading" in (given.get("class") or ""):
            # a page names a function that its module is called after by its whole path
            self.names.add(re.sub(r"(functional|models|diagnose)\.([a-z]\w*\.)+", "", given["id"]))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("link", "script", "img", "iframe"):
            self.loads += [given[key] for key in ("href", "src") if given.get(key)]
        if tag in ("math", "code", "pre", "script", "style"):
            self._inside.append(tag)
            if tag == "math":
                self.mathematics.append("")

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.prose.append(data)
        elif self._inside[-1] == "math":
            self.mathematics[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the built site, by path."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}


def test_every_public_name_is_on_an_api_page_and_no_other(site):
    pages = [page for path, page in site.items() if path.parent.name == "reference"]
    names = set().union(*(page.names for page in pages))
    reference = {name for name in names if name.startswith("batchnorm.reference.")}
    assert not [name for name in reference if re.search(r"\._", name)]
    frameworks = {f"batchnorm.{name}" for name in FRAMEWORKS}
    assert names - reference == {f"batchnorm.{name}" for name in PUBLIC} | frameworks


def test_links_and_their_anchors_exist(site):
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in site:
                assert unquote(parts.fragment) in site[target].anchors, f"{path.name}: {link}"


def test_pages_load_nothing_from_elsewhere(site):
    for path, page in site.items():
        for address in page.loads:
            parts = urlsplit(address)
            assert not parts.scheme or parts.scheme == "data", f"{path.name}: {address}"
            assert not parts.netloc, f"{path.name}: {address}"
            if parts.path:
                assert (path.parent / unquote(parts.path)).exists(), f"{path.name}: {address}"


def test_mathematics_and_examples_are_set_as_such(site):
    """No formula and no doctest was left to read as text, nor a LaTeX command in a formula."""
    for path, page in site.items():
        prose = "".join(page.prose)
        assert "$" not in prose, path.name
        assert ">>>" not in prose, path.name
        assert not [formula for formula in page.mathematics if "\\" in formula], path.name
    (mathematics,) = [page for path, page in site.items() if path.name == "mathematics.html"]
    assert len(mathematics.mathematics) > 50
