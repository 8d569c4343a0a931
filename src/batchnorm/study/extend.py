"""What a user brings to a study: networks, forms of data, claims.

An extension is a Python file, or a module that can be imported. What it brings are the instances
of `Network`, `DataForm` and `Claim` among its names; nothing is registered.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import cloudpickle

from batchnorm.study import paper
from batchnorm.study.claims import Claim, all_claims
from batchnorm.study.data import FORMS, DataForm
from batchnorm.study.errors import printable
from batchnorm.study.networks import NETWORKS, Network
from batchnorm.study.tasks import VERSIONS, StudyError
from batchnorm.study.workers import reason


@dataclass(frozen=True)
class Brought:
    """What a user brings.

    Attributes:
        networks: Networks beside the study's own; claims about any network measure them, too.
        forms: Forms of data beside the study's own.
        claims: Claims beside the study's own.
    """

    networks: Sequence[Network] = ()
    forms: Sequence[DataForm] = ()
    claims: Sequence[Claim] = ()


def bring(places: Sequence[str]) -> Brought:
    """Import extensions, and collect what they bring.

    A run of a network from an extension is named by the content of the extension's file, or of all
    files of its package, so that it is done again when they have changed; and workers get the code
    with the run.

    Args:
        places: Paths of Python files, or names of modules.

    Returns:
        What they bring.

    Raises:
        StudyError: A place cannot be imported, brings nothing, or uses a name that is taken.
    """
    own = {id(value) for value in (*NETWORKS.values(), *FORMS, *all_claims(), paper.CLAIM)}
    found: dict[int, Network | DataForm | Claim] = {}  # by identity: one may have two names
    for place in places:
        module = _module(place)
        brings = {
            id(value): value
            for value in vars(module).values()
            if isinstance(value, Network | DataForm | Claim) and id(value) not in own
        }
        if not brings:
            raise StudyError(
                f"{printable(place)}: got no Network, DataForm or Claim of its own among its "
                "names, expected one; give what it brings a name in the module"
            )
        _mark(module)
        found |= brings
    networks = [value for value in found.values() if isinstance(value, Network)]
    forms = [value for value in found.values() if isinstance(value, DataForm)]
    claims = [value for value in found.values() if isinstance(value, Claim)]
    _refuse_taken("network", [network.name for network in networks], NETWORKS)
    _refuse_taken("data", [form.kind for form in forms], [form.kind for form in FORMS])
    _refuse_taken("claim", _called(claims), _called(all_claims()))
    return Brought(networks, forms, claims)


def _module(place: str) -> ModuleType:
    """Import a place."""
    path = Path(place)
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        # Files in two folders may have one name, and one that is moved should keep its runs.
        content = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        stem = re.sub(r"\W", "_", path.stem)
        name = f"batchnorm_study_{stem}_{content}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # it is somebody's code: anything may be wrong with it
        raise StudyError(
            f"{printable(place)}: importing it failed with {reason(error)}; name a Python file, "
            "or a module that can be imported"
        ) from error


def _mark(module: ModuleType) -> None:
    """Version a file, or a whole package; and let its functions travel to others by value."""
    top = sys.modules[module.__name__.partition(".")[0]]
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    files = {
        path.relative_to(folder).as_posix(): path
        for folder in folders
        for path in folder.rglob("*.py")
    } or {"": Path(top.__file__ or "")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    for name in sys.modules:
        if name.partition(".")[0] == top.__name__:
            VERSIONS[name] = f"@{digest.hexdigest()[:12]}"
    cloudpickle.register_pickle_by_value(top)  # and with it all modules inside


def _called(claims: Iterable[Claim]) -> list[str]:
    """Return what a command line may call claims: their numbers and names."""
    return [word for claim in claims for word in dict.fromkeys((claim.key, claim.name))]


def _refuse_taken(kind: str, names: Sequence[str], taken: Iterable[str]) -> None:
    seen = set(taken)
    for name in names:
        if name in seen:
            raise StudyError(f"the {kind} {name!r} exists already: give yours another name")
        seen.add(name)
