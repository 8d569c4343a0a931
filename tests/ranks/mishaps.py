"""Checks that go wrong, to see that it is noticed; no world runs them of itself."""

import os
import time

from ranks.processes import check


@check()
def goes_well(rank, size):
    pass


@check()
def fails_on_rank_1(rank, size):
    assert rank != 1, "as it should"


@check()
def takes_rank_0_down(rank, size):
    if rank == 0:
        os._exit(7)


@check(limit=0.5)
def hangs(rank, size):
    while True:
        time.sleep(0.1)


@check()
def goes_well_after_all(rank, size):
    pass
