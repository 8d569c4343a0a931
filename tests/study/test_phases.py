"""When a network begins to learn, and which looks are before."""

import pytest
from study.small import plan_of

from batchnorm.study.measures.phases import before, begun, learning
from batchnorm.study.measures.runs import NotMeasured
from batchnorm.study.observation import Result

PLAN = plan_of(1.0)  # its loss of guessing is log(10) = 2.30, and 90% of that 2.07


def probe(state):
    """What looked at these runs, by name."""


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 1.81, 1.79, 2.0], 2),  # of where it starts
        ([3.0, 2.3, 2.1, 2.0], 3),  # a fall to the plateau of guessing is no learning
    ],
)
def test_it_begins_below_the_start_and_below_guessing(losses, expected):
    assert begun(Result(losses=losses), PLAN) == expected


def test_it_may_never_begin():
    with pytest.raises(NotMeasured, match="did not begin to learn in 2 steps"):
        begun(Result(losses=[2.0, 1.9]), PLAN)


def test_the_looks_are_parted():
    observed = {"probe": [[0, None], [1, None], [2, None], [4, None]]}
    made = Result(losses=[2.0, 1.9, 1.5, 2.0], observed=observed)
    assert before(made, PLAN, probe, [5, 6, 7, 8]) == [5, 6]
    assert learning(made, PLAN, probe, [5, 6, 7, 8]) == [7, 8]
