"""What a study leaves in its folder: pages, tables, pictures; each file whole or not at all."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

from batchnorm.models.files import whole
from batchnorm.study import markdown, pictures, results, summary
from batchnorm.study.claims import Judgement
from batchnorm.study.errors import printable
from batchnorm.study.page import encoded, page, picture
from batchnorm.study.story import Story
from batchnorm.study.tasks import StudyError


def write(folder: Path, story: Story) -> Path:
    """Write the report, its pictures, and its numbers.

    A picture that cannot be drawn is left away, with a warning. Pictures of an earlier report in
    the folder that are no longer part of it are removed.

    Args:
        folder: Where they go: `report.html`, `report.md`, `figures/*.png` and `*.svg`,
            `results.csv`, `effects.csv`, and `study.json`.
        story: What came of the study.

    Returns:
        The path of the page.

    Raises:
        StudyError: A file cannot be written.
    """
    figures = folder / "figures"
    try:
        figures.mkdir(exist_ok=True)
    except OSError as error:
        raise _refused(figures, error, "move it away, or name another folder") from error
    drawn = [_drawn(judgement) for judgement in story.judgements]
    story = dataclasses.replace(story, judgements=[judgement for judgement, _ in drawn])
    files = {name: content for _, contents in drawn for name, content in contents.items()}
    for name, content in files.items():
        replace(figures / name, content)
    replace(folder / "results.csv", results.values(story.judgements))
    replace(folder / "effects.csv", results.effects(story.judgements))
    replace(folder / "report.md", markdown.text(story))
    replace(folder / "report.html", page(story))
    for name in _earlier(folder) - set(files):
        (figures / name).unlink(missing_ok=True)
    replace(folder / summary.NAME, summary.encode(story))  # last: it says that the rest is there
    return folder / "report.html"


def replace(path: Path, content: str | bytes) -> None:
    """Write a file whole, or leave what is there.

    Args:
        path: Where it goes.
        content: Text, of which what UTF-8 cannot say becomes a question mark; or bytes.

    Raises:
        StudyError: It cannot be written.
    """
    content = content.encode(errors="replace") if isinstance(content, str) else content
    try:
        with whole(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        way_out = "name a file in a folder that is there, and in which there is room"
        raise _refused(path, error, way_out) from error


def _refused(path: Path, error: OSError, way_out: str) -> StudyError:
    return StudyError(f"{printable(str(path))}: {error.strerror or error}; {way_out}")


def _drawn(judgement: Judgement) -> tuple[Judgement, Mapping[str, bytes]]:
    """Return what came of a claim with the pictures that can be drawn, and their files."""
    kept = {}
    for place, chart in enumerate(judgement.charts):
        panels: list[dict[str, object]] = []
        try:
            picture("", chart, [], panels)
            encoded(panels)
            kept[place] = pictures.files(chart)
        except Exception as error:  # an extension's picture stops no report
            told = f"a picture of {judgement.claim.title!r} cannot be drawn: {error!r}"
            warnings.warn(told, stacklevel=3)
    charts = [judgement.charts[place] for place in kept]
    judgement = dataclasses.replace(judgement, charts=charts)
    named = zip(judgement.figures, kept.values(), strict=True)
    return judgement, {
        f"{name}.{suffix}": content for name, files in named for suffix, content in files.items()
    }


def _earlier(folder: Path) -> set[str]:
    """Return the names of the pictures of an earlier report in the folder; not of other files."""
    try:
        verdicts = summary.read(folder).verdicts
    except StudyError:  # there is none
        return set()
    names = [name for verdict in verdicts for name, _ in verdict.figures]
    return {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
