"""What a study leaves in its folder: pages, a table, pictures; each file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from batchnorm.study.markdown import text
from batchnorm.study.page import page
from batchnorm.study.pictures import png
from batchnorm.study.story import Story
from batchnorm.study.table import markdown


def write(folder: Path, story: Story) -> Path:
    """Write `report.html`, `report.md`, `table.md`, and `figures/*.png`.

    Args:
        folder: Where they go.
        story: What came of the study.

    Returns:
        The path of the page.
    """
    pictures = folder / "figures"
    pictures.mkdir(exist_ok=True)
    for judgement in story.judgements:
        for chart in judgement.charts:
            _replace(pictures / f"{chart.name}.png", png(chart))
    _replace(folder / "table.md", markdown(story).encode())
    _replace(folder / "report.md", text(story).encode())
    _replace(folder / "report.html", page(story).encode())
    return folder / "report.html"


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
