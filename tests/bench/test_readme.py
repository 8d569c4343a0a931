"""What `make bench` runs puts the table between its markers, and nothing else elsewhere."""

import runpy
from pathlib import Path

from batchnorm.bench.cases import Wanted

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "batch_norm.py"


def test_the_table_is_put_between_its_markers(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    begin, end = script["BEGIN"], script["END"]
    assert begin in (SCRIPT.parents[1] / "README.md").read_text(encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{begin}\n\nan old table\n\n{end}\n\nafter\n", encoding="utf-8")
    script["main"](Wanted.parse("8x4", quick=True), tmp_path)
    before, table, after = readme.read_text(encoding="utf-8").replace(end, begin).split(begin)
    assert (before, after) == ("before\n\n", "\n\nafter\n")
    assert table.strip().startswith("| shape | layout | MB | `torch.nn`, ms |")
    assert "| 8x4 | NC |" in table
    assert "old" not in table
    names = sorted(path.name for path in (tmp_path / "benchmarks" / "results").iterdir())
    assert names == ["cpu.csv", "cpu.json", "cpu.png"]
