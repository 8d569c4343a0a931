"""Real processes that run checks together: started, watched, and never left behind.

`run` starts one program, which imports torch once and forks into the ranks of a world. These go
through the checks in the same order, each check in a process group of its own, so that one that
fails spoils no other. What a rank says of a check is a line of its file; one that takes too long
prints where it is, and ends. The program is the head of a session of processes, which is killed as
a whole in the end, and every process has an alarm, should nobody be left to kill it.
"""

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
FOLDER = Path(__file__).parent

#: The modules that have checks.
MODULES = ("values", "participation", "variants", "training", "failures", "tools", "mishaps")


class Check(NamedTuple):
    """A function of (rank, size) that every process of a world runs."""

    run: Callable[[int, int], None]
    sizes: tuple[int, ...]
    patience: float  # how long a collective waits
    limit: float  # how long the check may take
    dies: bool  # whether a rank is lost in it, and its world with it
    needs: tuple[str, ...]  # what is imported before the ranks part, since it takes long


CHECKS: dict[str, Check] = {}


def check(*sizes, patience=20.0, limit=40.0, dies=False, needs=()):
    """Have worlds of these sizes run a function."""

    def register(function):
        assert function.__name__ not in CHECKS
        CHECKS[function.__name__] = Check(function, sizes, patience, limit, dies, needs)
        return function

    return register


def names_for(size):
    """Return the names of what a world of that size checks."""
    return [name for name, check in known().items() if size in check.sizes]


def known():
    """Return all checks."""
    for module in MODULES:
        import_module(f"ranks.{module}")
    return CHECKS


class Run(NamedTuple):
    """What came of a run: for each check and rank the seconds and the error, and what was printed.

    A rank that was not heard of has None.
    """

    said: dict[str, list[tuple[float, str] | None]]
    printed: str

    def failures(self):
        """Return check -> what went wrong, in words."""
        found = {}
        for name, each in self.said.items():
            wrong = [f"rank {r}: {said[1]}" for r, said in enumerate(each) if said and said[1]]
            silent = [rank for rank, said in enumerate(each) if said is None]
            if len(silent) != int(CHECKS[name].dies):
                wrong.append(f"not heard of: ranks {silent}")
            if wrong:
                found[name] = "\n".join(wrong)
        return found

    def report(self):
        """Return the failures as a text, the names first."""
        found = self.failures()
        parts = [f"== {name} ==\n{words}" for name, words in found.items()]
        return "\n\n".join(
            ["failed: " + ", ".join(found), *parts, f"== printed ==\n{self.printed}"]
        )


def run(size, names, folder, seconds):
    """Run checks in a world of that size.

    Args:
        size: Of the world.
        names: Of the checks.
        folder: An empty one.
        seconds: When to kill all of it.
    """
    program = [sys.executable, "-m", "ranks.processes", folder, size, seconds, *names]
    printed = launch(program, folder, seconds)
    said = {name: [None] * size for name in names}
    for rank in range(size):
        path = folder / f"said by {rank}"
        for line in path.read_text().splitlines() if path.exists() else ():
            name, took, error = json.loads(line)
            said[name][rank] = took, error
    known()
    return Run(said, printed)


def launch(program, folder, seconds):
    """Run a program and all that it starts, and return what they printed; kill what is left."""
    path = folder / "printed"
    with path.open("wb") as output:
        head = subprocess.Popen(
            [str(part) for part in program],
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.wait()
    return path.read_text(errors="replace")


def environment():
    """Return the variables that a process of a world starts with."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if sys.platform == "linux":
        ours["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine calls itself
    return os.environ | ours


def main(folder, size, seconds, *names):
    """Fork into the ranks of a world, once for all checks, and once for each that loses a rank."""
    checks = known()
    world = Path(folder), int(size), int(float(seconds)) + 5
    for name in names:
        if checks[name].dies:
            populate(*world, [name])
    rest = [name for name in names if not checks[name].dies]
    for module in {module for name in rest for module in checks[name].needs}:
        import_module(module)
    while rest:
        done = populate(*world, rest)
        rest = rest[done + 1 :]  # after one that took a rank down, too


def populate(folder, size, seconds, names):
    """Let a world run checks, and return how many of them all ranks came to the end of."""
    before = [count_said(folder, rank) for rank in range(size)]
    ranks = set()
    for rank in range(size):
        forked = os.fork()
        if forked == 0:
            signal.alarm(seconds)
            be(rank, size, folder, names)
        ranks.add(forked)
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status != 0 and not CHECKS[names[0]].dies:
            for other in ranks:  # which would wait for it in vain
                os.kill(other, signal.SIGKILL)
    return min(count_said(folder, rank) - before[rank] for rank in range(size))


def count_said(folder, rank):
    """Return of how many checks a rank said something."""
    path = folder / f"said by {rank}"
    return len(path.read_text().splitlines()) if path.exists() else 0


def be(rank, size, folder, names):
    """Run the checks as one of the ranks, and end."""
    import torch

    from batchnorm.kernels import native

    status = 1
    try:
        torch.set_num_threads(1)
        torch.set_deterministic_debug_mode("error")  # fills new memory with NaN
        if native._native is not None:
            native._native.poison_tensors(True)
        with (folder / f"said by {rank}").open("a", buffering=1) as output:
            for name in names:
                start = time.perf_counter()
                error = attempt(rank, size, folder, name)
                output.write(json.dumps([name, time.perf_counter() - start, error]) + "\n")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def attempt(rank, size, folder, name):
    """Return how a check failed on this rank, or an empty string."""
    import torch
    import torch.distributed as dist

    check = CHECKS[name]
    patience = timedelta(seconds=check.patience)
    store = dist.FileStore(str(folder / f"store of {name}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    wait_for_all(store, "begun", rank, size, patience)  # or else one may die too soon
    torch.manual_seed(0)
    faulthandler.dump_traceback_later(check.limit, exit=True)
    error = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check.run(rank, size)
    except BaseException as raised:
        error = described(raised)
    if not check.dies:  # nobody leaves while another may still be reading
        with contextlib.suppress(RuntimeError):
            wait_for_all(store, "done", rank, size, patience)
    if dist.is_initialized():
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
    return error


def wait_for_all(store, what, rank, size, patience):
    """Return when all ranks have come here."""
    store.set(f"{what} {rank}", "")
    store.wait([f"{what} {other}" for other in range(size)], patience)


def described(error):
    """Return an exception in words, with the lines of the checks and of the package it went by."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame for frame in frames if str(FOLDER) in frame.filename or "batchnorm" in frame.filename
    ]
    lines = traceback.format_list(ours or frames)
    return "".join([*lines, *traceback.format_exception_only(error)]).rstrip()


if __name__ == "__main__":
    from ranks import processes  # and not `__main__`, whose checks would be others

    processes.main(*sys.argv[1:])
