"""Made-up judgements for the tests of the report: every kind of chart, verdict and oddity."""

import math

from batchnorm.study.charts import STYLES, Axis, Chart, Panel, Series
from batchnorm.study.claims import Claim, Finding, Judgement, Row
from batchnorm.study.interval import Interval, difference, ratio
from batchnorm.study.measures.drawing import beside
from batchnorm.study.story import Story

HOSTILE = (
    "</script><img src=x onerror=alert(1)> <a href='http://x'>y</a> | [red]&amp; $x^ %{y} `_*"
    "\x1b[2J\ud800"
)
NETWORKS = ("sigmoid", "conv", "relu")


def claim(number, name, parts=NETWORKS, **told):
    """A claim that says what it is given, and measures nothing."""
    words = ("title", "says", "source", "measured", "rule", "unit")
    told = {word: f"{word} of {name}" for word in words} | told
    return Claim(number, name, parts=parts, tasks=None, measure=None, charts=None, **told)


def finding(part, held=(True,), **told):
    """What was found of a part, with a check for each of what held."""
    plain, ours = [900.0, 804.0, 884.0], [36.0, 50.0, 42.0]
    told = {"sentence": f"Of {part} this was found.", "without": "862", "with_": "42"} | told
    effect = ratio(plain, ours)
    return Finding(
        part,
        effect=str(effect),
        checks={f"check {place}": one for place, one in enumerate(held)},
        rows=[
            Row("plain", "steps", plain),
            Row("batchnorm", "steps", ours, effect),
            Row("batchnorm", "points", [1e-5, 2.5, -3.0], difference([3, 4, 6], [1], " points")),
        ],
        **told,
    )


def lines(title, choice="", styles=("plain", "torch", "batchnorm")):
    """A panel of lines with bands, on log axes."""
    x = [1, 10, 100]
    return Panel(
        title,
        Axis("steps", 1, 100, log=True),
        Axis("loss", 0.1, 20, log=True),
        [Series(style, x, [9, 3, 0.2], [8, 2, 0.15], [10, 4, 0.3]) for style in styles],
        goal=(2, "a goal"),
        choice=choice,
    )


def bars(title, *conditions):
    """A panel of values side by side."""
    conditions = conditions or ("plain", "batchnorm", "both", "dropout")
    return beside(title, "points", {name: [1.0, 2.0, 4.0] for name in conditions})


def odd():
    """A panel of values that JSON, or a logarithm, does not know."""
    values = [1.0, math.nan, math.inf, 0.0]
    y = Axis("y", 0.1, 10, log=True)
    return Panel("odd", Axis("x", 0, 3), y, [Series("plain", range(4), values)])


def judgements():
    """Every verdict, and a picture of every kind."""
    every = list(STYLES)
    charts = {
        "holds": [
            Chart("curves", "curves.", [lines("sigmoid, a"), bars("conv")]),
            Chart("styles", "styles.", [lines("sigmoid", styles=every[:6]), odd()]),
        ],
        "does not hold": [
            Chart("parts", "parts.", [lines(f"{part}, {x}") for x in "ab" for part in NETWORKS])
        ],
        "depends": [
            Chart(
                "choices",
                "choices.",
                [lines(f"{part}, {x}", choice=x) for x in ("1", "2") for part in NETWORKS]
                + [lines("sigmoid, 3", choice="3")],
                "Rate",
                "2",
            ),
            Chart("wide", "wide.", [bars("relu", *(f"k = {2**k}" for k in range(9)))]),
        ],
    }
    held = {"holds": (True, True), "does not hold": (False,), "depends": (True, False)}
    measured = [
        Judgement(
            claim(number, answer.replace(" ", "_")),
            [finding(part, held[answer]) for part in NETWORKS],
            charts[answer],
        )
        for number, answer in enumerate(held, start=1)
    ]
    broken = Finding("sigmoid", "A run broke off.")
    return [
        *measured,
        Judgement(claim(4, "not_measured"), [broken], [], ("conv", "relu")),
        Judgement(claim(5, "left_out"), [], [], NETWORKS),
        hostile(),
    ]


def hostile():
    """A claim whose every text is out to do harm."""
    words = ("title", "says", "source", "measured", "rule", "unit")
    series = [Series("other", [0, 1], [0, 1], name=HOSTILE)]
    ticks = [(0, HOSTILE), (1, "b")]
    x, y = Axis(HOSTILE, 0, 1, ticks=ticks), Axis(HOSTILE, 0, 1)
    panels = [
        Panel(HOSTILE, x, y, series, goal=(0.5, HOSTILE), choice=choice)
        for choice in (HOSTILE, "b")
    ]
    found = Finding(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        HOSTILE,
        HOSTILE,
        {HOSTILE: True},
        [Row(HOSTILE, HOSTILE, [1.0], Interval(1.0, 0.5, 2.0, HOSTILE))],
    )
    return Judgement(
        claim(0, "hostile", parts=(HOSTILE,), **dict.fromkeys(words, HOSTILE)),
        [found],
        [Chart(f"../{HOSTILE}", HOSTILE, panels, HOSTILE, HOSTILE)],
        (HOSTILE,),
    )


def story(name="digits", told=None, word="digits"):
    """A story of what is given, by default of all that can be made up."""
    told = judgements() if told is None else told
    made_on = {"cpu": word, word: "a"}
    return Story(name, told, word, {word: word}, made_on, ["batchnorm", "study", "--data", word])
