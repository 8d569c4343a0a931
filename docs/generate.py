"""Write what the last study found into README.md and the documentation: `make readme`."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from batchnorm.bench.save import put
from batchnorm.study.markdown import escaped, rows
from batchnorm.study.story import heading, lines
from batchnorm.study.summary import Summary, read
from batchnorm.study.tasks import StudyError

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "study"
PAPER = STUDY / "paper"
PICTURES = ROOT / "docs" / "images" / "study"
SHIFTS = "<!-- shifts: written by `make readme` -->", "<!-- end of shifts -->"
BEGIN, END = "<!-- study table: written by `make readme` -->", "<!-- end of study table -->"


def main() -> None:
    """Put a table into README.md, the report and the pictures into docs/."""
    try:
        found, paper = read(STUDY), read(PAPER)
    except StudyError as error:
        sys.exit(f"Error: {error}")
    if missing := [verdict.name for verdict in found.verdicts if verdict.left_out]:
        sys.exit(
            f"Error: {STUDY}: parts of {', '.join(missing)} were left out for time, expected a "
            "whole study; do it again with --budget full"
        )
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    table = f"{BEGIN}\n\n{brief(found)}\n\n{END}"
    readme.write_text(pattern.sub(lambda _: table, text), encoding="utf-8")

    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir(parents=True)
    for folder, summary in ((STUDY, found), (PAPER, paper)):
        for name in (name for verdict in summary.verdicts for name, _ in verdict.figures):
            shutil.copy(folder / "figures" / f"{name}.png", PICTURES)
    shifts = (STUDY / "shifts.md").read_text(encoding="utf-8").strip()
    put(ROOT / "docs" / "shift.md", SHIFTS[0], shifts, SHIFTS[1])
    shutil.copy(STUDY / "shifts.png", PICTURES)
    page = (STUDY / "report.md").read_text(encoding="utf-8").replace("(figures/", "(images/study/")
    (ROOT / "docs" / "study.md").write_text(page, encoding="utf-8")


def brief(found: Summary) -> str:
    """Return a line for each claim: whether it holds, and the effect in its first part."""
    told = []
    for verdict in found.verdicts:
        first, *_ = lines(verdict.findings)
        claim = f"{heading(verdict.number, verdict.title)} ({verdict.unit})"
        told.append((claim, verdict.answer, *first))
    headings = ("claim", "verdict", "first part", "from", "to", "effect")
    question = f"**What did batch normalization do on {escaped(found.data)}?**"
    return f"{question}\n\n{rows(headings, told, 'lllrrl')}"


if __name__ == "__main__":
    main()
