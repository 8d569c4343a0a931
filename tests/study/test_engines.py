"""Every engine does the same study, is complete whoever dies in it, and leaves nobody behind."""

import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cloudpickle
import distributed
import numpy as np
import psutil
import pytest
from rich.console import Console
from study.errands import Errand, Lonely
from study.small import small_data

from batchnorm.environment import describe
from batchnorm.study.engine import complete
from batchnorm.study.store import Store

SMALL = small_data()
DATA = replace(SMALL, train_inputs=np.repeat(SMALL.train_inputs, 40, 1))  # more than a megabyte
CONSOLE = Console(file=io.StringIO())

# What a file has that a user wrote, and no worker can import.
TRAVELLER = """
import sys
from dataclasses import asdict, dataclass

import study.errands

@dataclass(frozen=True, kw_only=True)
class Report(study.errands.Note):
    known: bool = True

@dataclass(frozen=True)
class Traveller(study.errands.Errand):
    kind = "traveller"
    outcome = Report

    def perform(self, data_set):
        note = super().perform(data_set)
        return Report(**asdict(note), known=__name__ in sys.modules)
"""


@pytest.fixture
def traveller(tmp_path, monkeypatch):
    """A module that is in no worker, and is registered to travel."""
    path = tmp_path / "traveller.py"
    path.write_text(TRAVELLER)
    spec = importlib.util.spec_from_file_location("traveller", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "traveller", module)
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    yield module
    cloudpickle.unregister_pickle_by_value(module)


def without_trace():
    """Tell whether no process of this one is left but those that keep the books."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        left = [child.cmdline() for child in psutil.Process().children(recursive=True)]
        if all("resource_tracker" in " ".join(words) for words in left):
            return True
        time.sleep(0.1)
    return False


def assert_the_same_study(folder, traveller, engine):
    tasks = [
        *(Errand("small", name) for name in ("a", "fail", "b", "exit")),
        traveller.Traveller("small", "c"),
        Lonely("small", "d"),
    ]
    with Store(folder, machine="this one") as store:
        complete(tasks, DATA, store, console=CONSOLE, jobs=2, engine=engine)
        found = [store[task] for task in tasks]
        machines = [store.machine(task) for task in tasks]
    assert [outcome.reason for outcome in found] == [
        *("", "RuntimeError: as it was told", "", "SystemExit: as it was told", "", "")
    ]
    for outcome in found:
        if not outcome.reason:
            assert outcome.values == pytest.approx(
                [DATA.train_inputs.sum(), DATA.test_labels.sum()]
            )
    assert [found[number].mapped for number in (0, 2, 4)] == [engine == "joblib"] * 3
    assert not found[4].known
    assert os.getpid() not in {outcome.process for outcome in found[:-1]}
    assert found[-1].process == os.getpid()  # what must be alone is, when the workers have gone
    assert machines == [describe()["cpu"]] * 5 + ["this one"]
    assert without_trace()


@pytest.mark.parametrize("engine", ["joblib", "dask"])
def test_every_engine_does_the_same_study(tmp_path, traveller, engine):
    assert_the_same_study(tmp_path, traveller, engine)


def test_ray_does_the_same_study(tmp_path, traveller):
    pytest.importorskip("ray", reason="Ray is not installed")
    import study.errands

    cloudpickle.register_pickle_by_value(study.errands)  # its workers do not know this folder
    try:
        assert_the_same_study(tmp_path, traveller, "ray")
    finally:
        cloudpickle.unregister_pickle_by_value(study.errands)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("engine", ["joblib", "dask"])
def test_a_study_that_loses_workers_is_complete_all_the_same(tmp_path, engine):
    names = ("a", "b", "stumble", "die")
    tasks = [Errand("small", name, str(tmp_path / "stumbled")) for name in names]
    with Store(tmp_path) as store:
        complete(tasks, DATA, store, console=CONSOLE, jobs=2, engine=engine)
        *others, died = (store[task].reason for task in tasks)
    assert others == [""] * 3
    assert died == "the process that ran it was lost, perhaps for want of memory"
    assert (tmp_path / "stumbled").exists()
    assert without_trace()


def test_a_cluster_that_runs_gets_the_data_once_and_runs_on(tmp_path):
    tasks = [Errand("small", f"look {number}") for number in range(6)]
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=None
    ) as cluster:
        with Store(tmp_path) as store:
            address = cluster.scheduler_address
            complete(tasks, DATA, store, console=CONSOLE, engine="dask", address=address)
            assert [store[task].values for task in tasks] == [[4]] * 6
        with distributed.Client(cluster) as client:
            assert client.submit(sum, [1, 2]).result(timeout=10) == 3


INTERRUPTED = """
import signal, sys
from pathlib import Path
from rich.console import Console
from study.errands import Errand
from study.small import small_data
from batchnorm.study.engine import complete
from batchnorm.study.store import Store

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and the like take it away
    tasks = [Errand("small", f"wait {number}") for number in range(1000)]
    with Store(Path(sys.argv[1])) as store:
        try:
            complete(tasks, small_data(), store, console=Console(), jobs=1, engine=sys.argv[2])
        except KeyboardInterrupt:
            print("interrupted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_a_cluster_of_its_own_without_a_word(tmp_path):
    path = tmp_path / "results.jsonl"
    study = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path), "dask"],
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while study.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    workers = psutil.Process(study.pid).children(recursive=True)
    assert len(workers) >= 2
    os.killpg(study.pid, signal.SIGINT)  # as a terminal does: to all of them
    said, _ = study.communicate(timeout=60)
    assert (said, study.returncode) == ("interrupted\n", 0)
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left
    assert path.read_bytes().endswith(b"}\n")
