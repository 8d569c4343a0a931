"""The numbers as CSV: every value and every effect, and no text that a spreadsheet computes."""

import csv

import pytest
from study.made_up import NETWORKS, claim, finding, judgements

from batchnorm.study.claims import Finding, Judgement, Row
from batchnorm.study.interval import difference
from batchnorm.study.results import effects, values


def read(text):
    return list(csv.DictReader(text.splitlines()))


def test_every_value_has_a_line():
    told = judgements()[:3]
    lines = read(values(told))
    assert len(lines) == sum(
        len(row.values) for each in told for found in each.findings for row in found.rows
    )
    assert lines[1] == {
        "claim": "1",
        "name": "holds",
        "part": "sigmoid",
        "condition": "plain",
        "measure": "steps",
        "index": "1",
        "value": "804",
    }
    assert {line["part"] for line in lines} == set(NETWORKS)


def test_every_effect_has_a_line_with_its_interval():
    told = judgements()[:1]
    lines = read(effects(told))
    expected = difference([3, 4, 6], [1])
    found = [line for line in lines if line["measure"] == "points" and line["part"] == "conv"]
    assert len(lines) == 2 * len(NETWORKS)
    assert [float(found[0][end]) for end in ("effect", "low", "high")] == pytest.approx(
        [expected.value, expected.low, expected.high]
    )
    assert [line["unit"] for line in lines[:2]] == ["×", "points"]
    where = ("claim", "name", "part", "condition", "measure")
    known = {tuple(line[key] for key in where) for line in read(values(told))}
    assert {tuple(line[key] for key in where) for line in lines} <= known


def test_a_number_keeps_its_digits():
    found = Finding("a", "", rows=[Row("b", "c", [0.1, -1234567.891, 5e-13, float("nan")])])
    lines = read(values([Judgement(claim(1, "x"), [found], [])]))
    assert [line["value"] for line in lines] == ["0.1", "-1234567.891", "5e-13", "nan"]


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_is_a_formula(begin):
    name = f'{begin}cmd|"/C calc"!A0'
    found = Finding(name, "", rows=[Row(name, name, [-1.0])])
    text = values([Judgement(claim(1, "x"), [found], [])])
    (line,) = list(csv.DictReader(text.splitlines(keepends=True)))
    assert [line[key] for key in ("part", "condition", "measure")] == 3 * [f"'{name}"]
    assert line["value"] == "-1"


def test_what_was_not_measured_has_no_lines():
    assert read(values(judgements()[3:5])) == []
    assert read(values([Judgement(claim(1, "x"), [finding("a")], [])])) != []
