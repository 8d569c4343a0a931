"""What takes part in a bench: ours, `torch.nn`, and the compilers, each as its users write it."""

from __future__ import annotations

from batchnorm.bench.cases import Case
from batchnorm.bench.contenders.contender import Contender as Contender
from batchnorm.bench.contenders.contender import Step as Step
from batchnorm.bench.contenders.jitted import Jitted
from batchnorm.bench.contenders.ours import GHOST_SIZE, Eager, Ghost, Mapped, Native
from batchnorm.bench.contenders.stock import Compiled, Stock

#: What all are compared with.
BASE: Contender = Stock()
NATIVE: Contender = Native()
MAPPED: Contender = Mapped()
GHOST: Contender = Ghost()
#: By their names on the command line.
PEERS: dict[str, Contender] = {"eager": Eager(), "compile": Compiled(), "jax": Jitted()}


def contenders(case: Case) -> list[Contender]:
    """Return who takes part in a case, whether or not it is there: `torch.nn`, ours, the peers."""
    ours = [NATIVE, MAPPED] if case.main else [NATIVE]
    if case.main and case.problem.shape[0] > GHOST_SIZE:
        ours.append(GHOST)
    return [BASE, *ours, *(PEERS[name] for name in case.peers)]
