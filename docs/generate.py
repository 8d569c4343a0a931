"""Write what the last study printed and drew into README.md and the documentation: `make readme`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "study"
PICTURES = ROOT / "docs" / "images" / "study"
BEGIN, END = "<!-- study table: written by `make readme` -->", "<!-- end of study table -->"


def main() -> None:
    """Put the table into README.md, the page and the pictures into docs/."""
    table = (STUDY / "table.md").read_text(encoding="utf-8").strip()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text), encoding="utf-8")

    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir(parents=True)
    for picture in sorted((STUDY / "figures").glob("*.png")):
        shutil.copy(picture, PICTURES)
    page = (STUDY / "report.md").read_text(encoding="utf-8").replace("(figures/", "(images/study/")
    (ROOT / "docs" / "study.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
