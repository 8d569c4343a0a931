"""Synchronized batch normalization over real processes; the checks are in the modules beside."""

import re
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks.processes import known, launch, names_for, run

ROOT = Path(__file__).parents[2]
MISHAPS = ["goes_well", "fails_on_rank_1", "takes_rank_0_down", "hangs", "goes_well_after_all"]


@pytest.mark.parametrize("size", [2, 3, 4, 1])
def test_what_every_process_of_a_world_checks(size, tmp_path):
    done = run(size, names_for(size), tmp_path, seconds=120)
    assert not done.failures(), done.report()


def test_row_11_one_collective_each_way_a_second_derivative_and_no_hanging(tmp_path):
    """They say: "SyncBN is slow, hangs, has no double backward".

    What torch has cannot even be tried on the CPU, which one of the checks shows.
    """
    names = [
        *("the_layer_of_torch_refuses_the_cpu", "one_collective_each_way", "double_backward"),
        *("no_value_is_read_back_from_the_device", "unequal_channels_are_told_to_every_rank"),
        *("a_rank_dies_before_the_forward_pass", "a_rank_never_arrives"),
    ]
    done = run(2, names, tmp_path, seconds=60)
    assert not done.failures(), done.report()


def test_mishaps_are_told_and_the_rest_goes_on(tmp_path):
    done = run(2, MISHAPS, tmp_path, seconds=60)
    found = done.failures()
    assert list(found) == ["fails_on_rank_1", "takes_rank_0_down", "hangs"]
    assert "rank 1" in found["fails_on_rank_1"]
    assert "AssertionError: as it should" in found["fails_on_rank_1"]
    assert "rank 0:" not in found["fails_on_rank_1"]
    assert "not heard of: ranks [0" in found["takes_rank_0_down"]
    assert "not heard of: ranks [0, 1]" in found["hangs"]
    assert "in hangs" in done.printed  # where it was


def test_nothing_is_left_of_what_takes_too_long(tmp_path):
    say = "os.write(1, b'%d ' % os.getpid())"
    program = f"import os, time; os.fork(); {say}; time.sleep(100)"
    start = time.monotonic()
    pids = [int(pid) for pid in launch([sys.executable, "-c", program], tmp_path, 2.0).split()]
    assert time.monotonic() - start < 10
    assert len(pids) == 2
    while any(map(is_alive, pids)):  # what is killed may take a moment to die
        assert time.monotonic() - start < 10
        time.sleep(0.01)


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_every_check_is_run_by_some_world():
    assert [name for name, check in known().items() if not check.sizes] == MISHAPS


def test_the_program_of_the_page_by_torchrun(tmp_path):
    page = (ROOT / "docs" / "synchronized.md").read_text(encoding="utf-8")
    program = re.search(r'^```python title="(.*?)"\n(.*?)^```$', page, re.DOTALL | re.MULTILINE)
    printed = re.search(r"^```text\n\$ torchrun .*?\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / program[1]).write_text(program[2])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = launch([*torchrun, tmp_path / program[1]], tmp_path, 90)
    lines = re.findall(r"rank \d: .*?variance \d+\.\d+", found)  # the ends of which mix
    assert sorted(lines) == printed[1].splitlines(), found
