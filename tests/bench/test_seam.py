"""The script that times what surrounds the kernels."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "seam.py"


def test_every_part_is_timed(capsys):
    times = runpy.run_path(str(SCRIPT))["main"](seconds=0)
    assert set(times) == {"torch.nn", "batchnorm", "a node that does nothing"}
    assert all(value > 0 for value in times.values())
    assert "a node that does nothing" in capsys.readouterr().out
