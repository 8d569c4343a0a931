"""What a user brings to a study: networks, forms of data, claims.

An extension is a Python file, or a module that can be imported. What it brings are the instances
of `Network`, `DataForm` and `Claim` among its names; nothing is registered.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import cloudpickle

from batchnorm.study.claims import Claim, all_claims
from batchnorm.study.data import FORMS, DataForm
from batchnorm.study.networks import NETWORKS, Network
from batchnorm.study.tasks import StudyError


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

    A run of a network from an extension is named by the content of the extension's file as well,
    so that it is done again when the file has changed; and workers get the code with the run.

    Args:
        places: Paths of Python files, or names of modules.

    Returns:
        What they bring.

    Raises:
        StudyError: A place cannot be imported, brings nothing, or uses a name that is taken.
    """
    networks: list[Network] = []
    forms: list[DataForm] = []
    claims: list[Claim] = []
    for place in places:
        values = list(vars(_module(place)).values())
        found = [value for value in values if isinstance(value, Network | DataForm | Claim)]
        if not found:
            raise StudyError(
                f"{place}: got no Network, DataForm or Claim among its names, expected one; "
                "give what it brings a name in the module"
            )
        networks += [value for value in found if isinstance(value, Network)]
        forms += [value for value in found if isinstance(value, DataForm)]
        claims += [value for value in found if isinstance(value, Claim)]
    _refuse_taken("network", [n.name for n in networks], NETWORKS)
    _refuse_taken("data", [form.kind for form in forms], [form.kind for form in FORMS])
    _refuse_taken("claim", [c.key for c in claims], [claim.key for claim in all_claims()])
    return Brought(networks, forms, claims)


def _module(place: str) -> ModuleType:
    """Import a place, version it, and let its functions travel to other processes by value."""
    path = Path(place)
    try:
        if path.suffix == ".py":
            name = f"batchnorm_study_{path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # it is somebody's code: anything may be wrong with it
        raise StudyError(
            f"{place}: importing it failed with {type(error).__name__}: {error}; name a Python "
            "file, or a module that can be imported"
        ) from error
    content = Path(module.__file__ or "").read_bytes() if module.__file__ else b""
    module.__study_version__ = f"@{hashlib.sha256(content).hexdigest()[:12]}"  # type: ignore[attr-defined]
    cloudpickle.register_pickle_by_value(module)
    return module


def _refuse_taken(kind: str, names: Sequence[str], taken: Iterable[str]) -> None:
    seen = set(taken)
    for name in names:
        if name in seen:
            raise StudyError(f"the {kind} {name!r} exists already: give yours another name")
        seen.add(name)
