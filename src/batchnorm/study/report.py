"""What a study leaves in its folder: pages, tables, pictures; each file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from batchnorm.study import markdown, pictures, results, summary
from batchnorm.study.page import page
from batchnorm.study.story import Story


def write(folder: Path, story: Story) -> Path:
    """Write the report, its pictures, and its numbers.

    Args:
        folder: Where they go: `report.html`, `report.md`, `table.md`, `figures/*.png` and `*.svg`,
            `results.csv`, `effects.csv`, and `study.json`.
        story: What came of the study.

    Returns:
        The path of the page.
    """
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for judgement in story.judgements:
        for chart in judgement.charts:
            for suffix, content in pictures.files(chart).items():
                replace(figures / f"{chart.file}.{suffix}", content)
    replace(folder / "results.csv", results.values(story.judgements))
    replace(folder / "effects.csv", results.effects(story.judgements))
    replace(folder / "table.md", markdown.table(story))
    replace(folder / "report.md", markdown.text(story))
    replace(folder / "report.html", page(story))
    replace(folder / summary.NAME, summary.encode(story))  # last: it says that the rest is there
    return folder / "report.html"


def replace(path: Path, content: str | bytes) -> None:
    """Write a file whole, or leave what is there.

    Args:
        path: Where it goes.
        content: Text, of which what UTF-8 cannot say becomes a question mark; or bytes.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
    partial.replace(path)
