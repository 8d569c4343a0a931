"""What a study found, as `study.json`: for another study to be compared with it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from batchnorm.study.claims import Finding
from batchnorm.study.claims.claim import Answer
from batchnorm.study.errors import printable
from batchnorm.study.story import Story
from batchnorm.study.tasks import StudyError

NAME = "study.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """What came of a claim.

    Attributes:
        number: The claim's number in the notes, or 0.
        name: Its name for links and files.
        title: What is claimed.
        unit: What its numbers are.
        answer: Whether it holds.
        findings: Part by part, without the numbers behind it.
        left_out: The parts that there was no time for.
        figures: The names of the pictures' files, without a suffix, and their captions.
    """

    number: int
    name: str
    title: str
    unit: str
    answer: str
    findings: Sequence[Finding]
    left_out: Sequence[str]
    figures: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Summary:
    """What came of a study.

    Attributes:
        folder: Where it is.
        data: The data set's name.
        command: What does it again.
        made_on: The hardware and the versions.
        verdicts: What came of each claim.
    """

    folder: Path
    data: str
    command: str
    made_on: dict[str, str]
    verdicts: Sequence[Verdict]


def encode(story: Story) -> str:
    """Return the content of `study.json`."""
    claims = [
        {
            "number": judgement.claim.number,
            "name": judgement.claim.name,
            "title": judgement.claim.title,
            "unit": judgement.claim.unit,
            "answer": judgement.answer,
            "parts": [_part(finding) for finding in judgement.findings],
            "left_out": list(judgement.left_out),
            "figures": [
                {"file": name, "caption": chart.caption}
                for name, chart in judgement.figures.items()
            ],
        }
        for judgement in story.judgements
    ]
    told = {
        "data": story.name,
        "command": story.repeating(),
        "made_on": dict(story.made_on),
        "claims": claims,
    }
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def _part(finding: Finding) -> dict[str, Any]:
    return {
        "part": finding.part,
        "effect": finding.effect,
        "without": finding.without,
        "with": finding.with_,
        "checks": dict(finding.checks),
        "sentence": finding.sentence,
    }


def read(folder: Path) -> Summary:
    """Read what a study found.

    Args:
        folder: The study's.

    Returns:
        What is in its `study.json`, whose every value has been looked at.

    Raises:
        StudyError: There is no such file, or it is not from a study.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(
            f"{printable(str(path))}: {error.strerror}; name the folder of a study that has ended"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _wrong(path, "no JSON") from error
    told = _Told(path, content)
    return Summary(
        folder=folder,
        data=told.get("data", str),
        command=told.get("command", str),
        made_on=told.mapping("made_on", str),
        verdicts=[_verdict(claim) for claim in told.each("claims")],
    )


def _verdict(told: _Told) -> Verdict:
    answer, left_out = told.get("answer", str), told.get("left_out", list)
    if answer not in get_args(Answer):
        raise told.wrong("answer", answer)
    if not all(isinstance(part, str) for part in left_out):
        raise told.wrong("left_out", left_out)
    return Verdict(
        number=told.get("number", int),
        name=told.get("name", str),
        title=told.get("title", str),
        unit=told.get("unit", str),
        answer=answer,
        findings=[_finding(part) for part in told.each("parts")],
        left_out=left_out,
        figures=[(_file(each), each.get("caption", str)) for each in told.each("figures")],
    )


def _finding(told: _Told) -> Finding:
    return Finding(
        part=told.get("part", str),
        sentence=told.get("sentence", str),
        effect=told.get("effect", str),
        without=told.get("without", str),
        with_=told.get("with", str),
        checks=told.mapping("checks", bool),
    )


def _file(told: _Told) -> str:
    """The name of a picture's file, which must not lead to another folder."""
    name = told.get("file", str)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise told.wrong("file", name)
    return name


class _Told:
    """A JSON object of a file, whose values must be of the kind that they are asked for as."""

    def __init__(self, path: Path, content: object) -> None:
        self._path = path
        if not isinstance(content, dict):
            raise _wrong(path, _shortened(content))
        self._content = content

    def get(self, key: str, kind: type[T]) -> T:
        value = self._content.get(key)
        if type(value) is not kind:
            raise self.wrong(key, value)
        return value

    def mapping(self, key: str, kind: type[T]) -> dict[str, T]:
        values = _Told(self._path, self.get(key, dict))
        return {name: values.get(name, kind) for name in values._content}

    def each(self, key: str) -> list[_Told]:
        return [_Told(self._path, value) for value in self.get(key, list)]

    def wrong(self, key: str, value: object) -> StudyError:
        return _wrong(self._path, f"{key!r}: {_shortened(value)}")


def _shortened(value: object) -> str:
    return repr(value)[:60]


def _wrong(path: Path, got: str) -> StudyError:
    return StudyError(
        f"{printable(str(path))}: got {printable(got)}, expected what a study writes; "
        "run that study's command again, which keeps what is done"
    )
