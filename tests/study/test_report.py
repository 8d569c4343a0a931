"""The report: it says what was found, loads nothing, believes no name, and is never torn."""

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from plotly import graph_objects
from rich.console import Console
from study.made_up import (
    HOSTILE,
    NETWORKS,
    bars,
    claim,
    finding,
    hostile,
    judgements,
    lines,
    odd,
    story,
)

from batchnorm.study.charts import STYLES, Axis, Chart, Panel, Series
from batchnorm.study.claims import Finding, Judgement, Row, judge
from batchnorm.study.interactive import figure
from batchnorm.study.interval import Interval
from batchnorm.study.markdown import code, escaped, table, text
from batchnorm.study.markup import document
from batchnorm.study.pictures import files
from batchnorm.study.report import write
from batchnorm.study.story import mark
from batchnorm.study.table import terminal
from batchnorm.study.tasks import StudyError

UNEVEN = Series("plain", [0, 1], [1])
HARMLESS = HOSTILE.replace("\ud800", "?")  # UTF-8 cannot say it
ANSWERS = ["holds", "does not hold", "depends", "not measured", "not measured", "holds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write(folder, story(HOSTILE, word=HOSTILE))
    return folder


class Page(HTMLParser):
    """What a browser would see in a page: its elements, and its text outside of scripts."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.inside = [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "report.html")


class TestPage:
    def test_it_loads_nothing(self, page, folder):
        names = {tag for tag, _ in page.elements}
        assert not names & {"link", "img", "iframe", "object", "embed", "audio", "video", "base"}
        for tag, attributes in page.elements:
            assert "src" not in attributes, tag
            assert attributes.get("href", "#").startswith("#")
            assert not any(name.startswith("on") for name in attributes)
        policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
        assert policy.startswith("default-src 'none';")
        text = (folder / "report.html").read_text()
        style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
        assert "url(" not in style
        assert "@import" not in style

    def test_a_name_is_text_whatever_is_in_it(self, page, folder):
        # question twice, lead, machine twice, run, reason, and the claim's own
        assert page.text.count(HARMLESS) >= 25
        text = (folder / "report.html").read_text()
        assert "<img" not in text.split("<script>")[0]
        assert "<" not in re.search('id="figures">(.*?)</script>', text)[1]

    def test_the_table_comes_first_and_leads_to_every_claim(self, page, folder):
        told = judgements()
        ids = [attributes.get("id") for _, attributes in page.elements]
        links = [a["href"] for _, a in page.elements if "href" in a]
        for judgement in told:
            claim = judgement.claim
            assert ids.count(claim.name) == 1
            assert ids.index("verdicts") < ids.index(claim.name)
            assert f"#{claim.name}" in links
        assert links.count("#verdicts") == len(told)
        assert next(a for tag, a in page.elements if tag == "section")["id"] == "holds"
        assert [j.answer for j in told] == ANSWERS
        text = (folder / "report.html").read_text()
        assert re.findall('class="verdict [a-z-]+">([a-z ]+)<', text) == 2 * ANSWERS

    def test_a_section_says_what_was_done_and_how_to_do_it_again(self, page):
        for word in ("title", "says", "source", "measured", "rule", "unit"):
            assert f"{word} of depends" in page.text
        assert "1. title of holds" in page.text
        assert "Of conv this was found." in page.text
        assert "The verdict comes from these checks alone" in page.text
        assert "✓ sigmoid check 0✗ sigmoid check 1" in page.text
        assert "Left out for time: conv, relu. The command below does them, too." in page.text
        assert "--claims 4 --budget full" in page.text
        assert "900, 804, 884" in page.text  # seed by seed
        opened = [a for tag, a in page.elements if tag == "details" and "open" in a]
        assert len(opened) == 4  # the numbers of each first part that has some

    def test_what_was_left_out_is_not_measured(self, page):
        assert "left out for time" in page.text
        assert "6 of 17 parts were left out for time" in page.text

    def test_every_panel_is_a_valid_figure(self, page, folder):
        text = (folder / "report.html").read_text(encoding="utf-8")
        script = re.search('<script type="application/json" id="figures">(.*?)</script>', text)[1]
        figures = json.loads(script)
        used = [int(a["data-figure"]) for _, a in page.elements if "data-figure" in a]
        assert used == list(range(len(figures)))
        for each in figures:
            assert set(graph_objects.Figure(each).to_plotly_json()) >= {"data", "layout"}

    def test_of_many_panels_one_part_is_shown(self, page):
        panels = [a for _, a in page.elements if a.get("class", "").startswith("panel ")]
        assert {a["data-part"] for a in panels} == {"conv", "relu"}
        shown = [a for _, a in page.elements if a.get("class") == "panel" and "hidden" not in a]
        assert {a["data-choice"] for a in shown} == {"", "2", HARMLESS}
        names = [a["data-name"] for tag, a in page.elements if tag == "select"]
        assert names == ["part", "part", "choice", "choice"]


class TestFiles:
    def test_each_picture_is_there_as_png_and_svg(self, folder):
        names = {name for judgement in judgements() for name in judgement.figures}
        found = sorted(file.name for file in (folder / "figures").iterdir())
        assert found == sorted(f"{name}.{suffix}" for name in names for suffix in ("png", "svg"))
        assert all(re.fullmatch(r"[\w-]+", name, re.ASCII) for name in names)
        for file in (folder / "figures").glob("*.png"):
            with Image.open(file) as image:
                image.load()
                assert min(image.size) > 300
        for file in (folder / "figures").glob("*.svg"):
            assert ElementTree.parse(file).getroot().tag.endswith("svg")

    def test_the_same_chart_is_the_same_file(self):
        chart = Chart("a", "b", [lines("conv"), bars("relu")])
        first, second = files(chart), files(chart)
        assert dict(first) == dict(second)
        assert b"<dc:date>" not in first["svg"]
        assert b">batchnorm</text>" in first["svg"]  # letters, not outlines

    def test_nothing_but_the_report_is_left(self, folder):
        names = "report.html report.md figures results.csv effects.csv study.json"
        assert {file.name for file in folder.iterdir()} == set(names.split())

    def test_no_two_pictures_have_one_name(self):
        charts = [Chart(name, "", [bars("a")]) for name in ("a b", "a/b", "", "x" * 300, "x" * 200)]
        names = list(Judgement(claim(1, "mine"), [], charts).figures)
        assert names[:3] == ["mine-a-b", "mine-a-b-2", "mine"]
        assert len(set(names)) == 5
        assert max(map(len, names)) == 80
        (other,) = Judgement(claim(2, "yours"), [], charts[:1]).figures
        assert other == "yours-a-b"

    def test_pictures_of_an_earlier_report_are_removed_and_no_others(self, tmp_path):
        first, second, *_ = judgements()
        write(tmp_path, story("x", [first, second]))
        (tmp_path / "figures" / "my-own.png").write_bytes(b"mine")
        write(tmp_path, story("x", [second]))
        found = {file.name for file in (tmp_path / "figures").iterdir()}
        assert found == {
            *("does_not_hold-parts.png", "does_not_hold-parts.svg", "my-own.png"),
        }

    def test_what_cannot_be_drawn_is_left_away(self, tmp_path):
        good = Chart("good", "good.", [bars("a")])
        bad = [
            Chart("style", "", [lines("a", styles=["no such style"])]),
            Chart("caption", 5, [bars("a")]),
            Chart("lengths", "", [Panel("a", Axis("", 0, 1), Axis("", 0, 1), [UNEVEN])]),
            Chart("ends", "", [Panel("a", Axis("", 0, 1), Axis("", math.nan, 1), [])]),
            Chart(
                "hidden", "", [bars("a"), Panel("a", *[Axis("", math.inf, 1)] * 2, [], None, "2")]
            ),
            Chart("none", "", None),
            "no chart",
        ]
        told = Judgement(claim(1, "mine"), [finding("a")], [*bad[:3], good, *bad[3:]])
        with pytest.warns(UserWarning, match="a picture of 'title of mine' cannot be") as caught:
            write(tmp_path, story("x", [told]))
        assert len([each for each in caught if "cannot be drawn" in str(each.message)]) == len(bad)
        assert 'id="figure-mine-good"' in (tmp_path / "report.html").read_text(encoding="utf-8")
        found = {file.name for file in (tmp_path / "figures").iterdir()}
        assert found == {"mine-good.png", "mine-good.svg"}

    def test_a_file_in_place_of_the_folder_is_named(self, tmp_path):
        (tmp_path / "figures").write_text("")
        with pytest.raises(StudyError, match="figures: File exists; move it away, or name another"):
            write(tmp_path, story("x", []))

    def test_a_file_is_whole_or_as_it_was(self, tmp_path, monkeypatch):
        write(tmp_path, story("x", []))
        before = (tmp_path / "report.html").read_bytes()
        whole = Path.write_bytes

        def torn(self, content):
            whole(self, content[: len(content) // 2])
            raise OSError("no space left")

        monkeypatch.setattr(Path, "write_bytes", torn)
        with pytest.raises(StudyError, match=r"results\.csv: no space left"):
            write(tmp_path, story("y", []))
        assert (tmp_path / "report.html").read_bytes() == before


class TestExtension:
    """What somebody's claim tells is told, or said to have failed."""

    @pytest.mark.parametrize(
        ("told", "reason"),
        [
            ({"rows": [Row("a", "b", ["1.0"])]}, "TypeError: must be real number, not str"),
            ({"rows": [Row("a", "b", [math.nan])]}, "ValueError: b of a is not finite"),
            ({"rows": [Row("a", "b", [1.0], 3.5)]}, "TypeError: the effect 3.5 is no Interval"),
            ({"rows": [Row("a", "b", [1.0], Interval("1", 0, 2))]}, "TypeError: bad operand"),
            ({"rows": [Row("a", None, [1.0])]}, "TypeError: None is no text"),
            ({"rows": None}, "TypeError: 'NoneType' object is not iterable"),
            ({"effect": 2.0}, "TypeError: 2.0 is no text"),
            ({"checks": {1: True}}, "TypeError: 1 is no text"),
        ],
    )
    def test_what_cannot_be_told(self, told, reason, tmp_path):
        found = Finding("a", "It is.", **{"checks": {"is": True}} | told)
        mine = replace(claim(21, "mine"), measure=lambda *_: found, charts=lambda *_: [])
        judgement = judge(mine, ["a"], None, None)
        assert judgement.answer == "not measured"
        assert judgement.findings[0].sentence.startswith(f"Measuring failed: {reason}")
        write(tmp_path, story("x", [judgement]))

    def test_numbers_of_numpy_are_numbers(self, tmp_path):
        values = np.array([1, 2], dtype=np.float32)
        found = Finding("a", "", checks={"is": values[0] < 2}, rows=[Row("a", "b", values)])
        mine = replace(claim(21, "mine"), measure=lambda *_: found, charts=lambda *_: iter(()))
        judgement = judge(mine, ["a"], None, None)
        assert judgement.findings[0].rows == [Row("a", "b", [1.0, 2.0])]
        assert judgement.answer == "holds"
        write(tmp_path, story("x", [judgement]))

    @pytest.mark.parametrize("name", ["", "a b", "../a", "x" * 41, "\u00e9"])
    def test_a_claim_whose_name_is_no_name_for_files(self, name):
        with pytest.raises(ValueError, match="at most 40 letters, digits and underscores"):
            claim(21, name)

    def test_a_claim_whose_title_is_no_text(self):
        with pytest.raises(TypeError, match="the claim mine: its title is no text"):
            claim(21, "mine", title=None)


class TestTable:
    def test_it_fits_80_columns(self):
        told = [
            Judgement(judgement.claim, judgement.findings, [], judgement.left_out)
            for judgement in judgements()[:-1] * 4
        ]
        console = Console(file=io.StringIO(), width=80)
        console.print(terminal(story("digits", told)))
        shown = console.file.getvalue()
        assert "What did batch normalization do on digits?" in shown
        assert "…" not in shown
        assert all(len(line) <= 80 for line in shown.splitlines())
        assert re.search(r"1\. title of holds +unit of holds +holds\n", shown)
        effect = re.escape(finding("conv").effect)
        assert re.search(f"✓ conv +862 +42  {effect}", shown)
        assert re.search(f"✗ relu +862 +42  {effect}", shown)
        assert re.search(f"~ relu +862 +42  {effect}", shown)
        assert re.search("sigmoid +not measured", shown)
        assert "left out for time" in shown

    def test_a_name_steers_no_terminal(self):
        console = Console(file=io.StringIO(), width=80)
        console.print(terminal(story(HOSTILE, [hostile()])))
        assert "[red]" in console.file.getvalue()
        assert "\x1b" not in console.file.getvalue()
        assert "\\x1b[2J" in console.file.getvalue()


class TestMarkdown:
    def test_the_table_has_a_line_for_each_part(self):
        rows = [line for line in table(story()).splitlines() if line.startswith("|")]
        assert rows[0] == "| claim | verdict | part | from | to | effect |"
        assert len(rows) == 2 + 3 * len(NETWORKS) + 1 + 1 + 1
        assert all(row.count("|") == 7 for row in rows)
        assert rows[2].startswith("| 1. title of holds (unit of holds) | holds | ✓ sigmoid | 862 |")
        assert rows[3].startswith("|  |  | ✓ conv |")

    def test_the_report_has_the_pictures_and_the_numbers(self):
        told = text(story())
        assert "![curves.](figures/holds-curves.png)" in told
        assert "| sigmoid | plain | steps | 884 | 900, 804, 884 |  |" in told
        assert "- ✗ relu: check 0" in told
        assert (
            "```sh\nbatchnorm study --data digits --claims 3 --budget full --out study-3\n```"
            in told
        )

    def test_a_name_is_text(self):
        told = text(story(HOSTILE, [hostile()], HOSTILE))
        outside = re.sub("(?s)(````*)sh\n.*?\n\\1", "", told)
        assert "<img" not in outside
        assert "\\`\\_\\*" in outside
        assert escaped("a\n\n# b") == "a # b"
        assert code("a```b") == "````sh\na```b\n````"


@pytest.mark.parametrize(
    ("held", "expected"), [((True, True), "✓"), ((False,), "✗"), ((True, False), "~"), ((), "")]
)
def test_a_part_is_marked_by_its_checks(held, expected):
    assert mark(finding("conv", held)) == expected


class TestCharts:
    def test_labels_stand_at_the_ends_of_their_lines_and_apart(self):
        ends = {"plain": 9.9, "torch": 10, "batchnorm": 2}
        drawn = [Series(style, [1, 2], [0, y]) for style, y in ends.items()]
        labels = Panel("", Axis("", 1, 2), Axis("", 0, 10), drawn).labels()
        assert [line.style for line, _ in labels] == ["batchnorm", "plain", "torch"]
        heights = [height for _, height in labels]
        assert heights[0] == pytest.approx(0.2, abs=0.1)
        assert heights[2] == pytest.approx(1.0)
        assert heights[2] - heights[1] == pytest.approx(0.075)

    def test_a_long_label_takes_two_lines(self):
        drawn = [Series("both", [1], [5]), Series("plain", [1], [5])]
        assert drawn[0].lines == ["batchnorm +", "dropout"]
        (_, low), (_, high) = Panel("", Axis("", 0, 1), Axis("", 0, 10), drawn).labels()
        assert high - low == pytest.approx(0.1125)

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (1, 1000, [1, 10, 100, 1000]),
            (1e-17, 10, [1e-17, 1e-14, 1e-11, 1e-8, 1e-5, 1e-2, 10]),
            (30, 300, [50, 100, 200]),
            (2.1, 5.2, [3, 4, 5]),
            (2.1, 2.42, [2.1, 2.2, 2.3, 2.4]),
        ],
    )
    def test_the_marks_of_a_log_axis_are_round_and_few(self, start, end, expected):
        marks = [value for value, _ in Axis("", start, end, log=True).marks()]
        assert marks == pytest.approx(expected)

    def test_what_is_no_number_stops_nothing(self):
        drawn = figure(odd())
        assert drawn["data"][0]["y"] == [1.0, None, None, 0.0]
        json.dumps(drawn, allow_nan=False)
        assert files(Chart("a", "b", [odd()]))["png"].startswith(b"\x89PNG")

    def test_a_choice_that_is_not_there_is_not_shown(self):
        chart = Chart("a", "b", [lines("x", "1"), lines("x", "2")], "Rate", "3")
        assert [panel.choice for panel in chart.shown()] == ["1"]

    def test_both_draw_what_the_chart_says(self):
        panel = Panel(
            "conv",
            Axis("steps", 1, 100, log=True),
            Axis("loss", 0.1, 10, log=True),
            [Series("plain", [1, 10, 100], [5, 2, 1], [4, 1, 0.5], [6, 3, 2])],
            goal=(2, "a goal"),
        )
        drawn = figure(panel)
        band, line = drawn["data"]
        assert (line["x"], line["y"]) == ([1, 10, 100], [5, 2, 1])
        assert band["y"] == [6, 3, 2, 0.5, 1, 4]
        assert line["line"]["color"] == STYLES["plain"].colour
        assert drawn["layout"]["xaxis"]["range"] == [0, 2]
        assert drawn["layout"]["xaxis"]["ticktext"] == ["1", "10", "100"]
        assert [note["text"] for note in drawn["layout"]["annotations"]] == ["plain", "a goal"]
        svg = files(Chart("a", "b", [panel]))["svg"].decode()
        for word in ("conv", "steps", "loss", "plain", "a goal", STYLES["plain"].colour.lower()):
            assert word in svg


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rgb(colour):
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


@pytest.mark.parametrize(("paper", "ink"), [("#fdfdfb", "#1d2127"), ("#15181c", "#e8eaed")])
def test_colours_are_read_on_white_and_on_black(paper, ink):
    page = document("", "")
    assert f"--paper: {paper}" in page
    assert f"--ink: {ink}" in page
    for style in STYLES.values():
        assert contrast(rgb(style.colour), rgb(paper)) >= 3, style.name  # WCAG 2, graphical objects
        assert f"color-mix(in srgb,{style.colour} 70%,var(--ink))" in page
        text = [0.7 * a + 0.3 * b for a, b in zip(rgb(style.colour), rgb(ink), strict=True)]
        assert contrast(text, rgb(paper)) >= 4.5, style.name  # WCAG 2, text
