"""The report: it says what was found, loads nothing, believes no name, and is never torn."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly import graph_objects
from rich.console import Console
from study.small import result, rising, small_data, small_plan

from batchnorm.study.charts import STYLES, Axis, Chart, Panel, Series
from batchnorm.study.claims import CLAIMS, judge
from batchnorm.study.interactive import figure
from batchnorm.study.networks import NORMS
from batchnorm.study.pictures import png
from batchnorm.study.report import write
from batchnorm.study.store import Store
from batchnorm.study.story import Story
from batchnorm.study.table import markdown, terminal
from batchnorm.study.timing import Times, Timing
from batchnorm.study.training import Result

HOSTILE = "</script><img src=x onerror=alert(1)> | [red]&"
CHARTS = ["learning-curves", "loss-curves", "epoch-time", "learning-rates", "differences"]


def made_up(task):
    """An outcome for any task, by which every claim holds but the second."""
    if isinstance(task, Timing):
        return Times(seconds={"plain": [0.02] * 3, "torch": [0.03] * 3, "batchnorm": [0.01] * 3})
    if task.learning_rate == 1.0 and task.norm == "plain":
        return Result(reason="the loss was nan at step 1")
    return result(rising(6 if task.norm == "plain" else 2, steps=8))


@pytest.fixture(scope="module")
def judgements(tmp_path_factory):
    plan = small_plan(small_data())
    with Store(tmp_path_factory.mktemp("store")) as store:
        for task in {task for claim in CLAIMS for task in claim.tasks(plan)}:
            store.add(task, made_up(task))
        return judge(plan, store)


@pytest.fixture(scope="module")
def folder(judgements, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write(folder, story(HOSTILE, judgements))
    return folder


def story(name, judgements):
    return Story(name, judgements, name, {name: name}, {"cpu": name}, name)


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


def test_the_page_loads_nothing(page, folder):
    names = {tag for tag, _ in page.elements}
    assert not names & {"link", "img", "iframe", "object", "embed", "audio", "video", "base"}
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none';")
    style = re.search("<style>(.*?)</style>", (folder / "report.html").read_text(), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_a_name_is_text_whatever_is_in_it(page, folder):
    assert page.text.count(HOSTILE) >= 6  # title, heading, lead, machine, a run and its reason
    assert "<img" not in (folder / "report.html").read_text().split("<script>")[0]


def test_the_page_has_a_section_and_pictures_for_every_claim(page):
    ids = [attributes.get("id") for _, attributes in page.elements]
    links = [a["href"] for _, a in page.elements if "href" in a]
    for claim in CLAIMS:
        assert ids.count(claim.name) == 1
        assert f"#{claim.name}" in links
        assert claim.says in page.text
        assert claim.rule in page.text
    assert [each for each in ids if each in CHARTS] == CHARTS


def test_every_panel_is_a_valid_figure(page, folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    script = re.search('<script type="application/json" id="figures">(.*?)</script>', text)[1]
    figures = json.loads(script)
    used = [int(a["data-figure"]) for _, a in page.elements if "data-figure" in a]
    assert set(used) <= set(range(len(figures)))
    for each in figures:
        assert set(graph_objects.Figure(each).to_plotly_json()) >= {"data", "layout"}
    shown = [a for _, a in page.elements if a.get("class") == "panel" and "hidden" not in a]
    assert len(shown) == 2 * len(CHARTS)


def test_the_pictures_are_there_too(folder):
    files = sorted((folder / "figures").iterdir())
    assert [file.name for file in files] == sorted(f"{name}.png" for name in CHARTS)
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n") for file in files)


def test_nothing_but_the_report_is_left(folder):
    assert {file.name for file in folder.iterdir()} == {
        *("report.html", "report.md", "table.md", "figures"),
    }


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write(tmp_path, story("x", []))
    before = (tmp_path / "report.html").read_bytes()
    whole = Path.write_bytes

    def torn(self, content):
        whole(self, content[: len(content) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path, story("y", []))
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_table_fits_80_columns(judgements):
    console = Console(file=io.StringIO(), width=80)
    console.print(terminal(story("digits", judgements)))
    shown = console.file.getvalue()
    assert "What did batch normalization do on digits?" in shown
    assert "…" not in shown
    for judgement in judgements:
        for finding in judgement.findings:
            assert finding.effect in shown
    console.print(terminal(story(HOSTILE, judgements)))
    assert "[red]" in console.file.getvalue()


def test_the_table_is_markdown_too(judgements):
    lines = markdown(story("digits", judgements)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0] == ("| claim | network | plain | torch.nn | batchnorm | effect | verdict |")
    assert len(rows) == 2 + 2 * len(CLAIMS)
    assert all(row.count("|") == 8 for row in rows)
    assert rows[2].endswith("| **holds** |")
    assert rows[4].endswith("| 1.50×, 0.50× | **depends** |")


def test_labels_stand_at_the_ends_of_their_lines_and_apart():
    lines = [Series(norm, [1, 2], [0, y]) for norm, y in zip(NORMS, (9.9, 10, 2), strict=True)]
    labels = Panel("", Axis("", 1, 2), Axis("", 0, 10), lines).labels()
    assert [style for style, _ in labels] == ["batchnorm", "plain", "torch"]
    heights = [height for _, height in labels]
    assert heights[0] == pytest.approx(0.2, abs=0.1)
    assert heights[2] == pytest.approx(1.0)
    assert heights[2] - heights[1] == pytest.approx(0.075)


@pytest.mark.parametrize("ground", [(255, 255, 255), (21, 24, 28)])
def test_colours_are_read_on_white_and_on_black(ground):
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper = luminance([c / 255 for c in ground])
    for style in STYLES.values():
        ink = luminance([int(style.colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        high, low = max(ink, paper), min(ink, paper)
        assert (high + 0.05) / (low + 0.05) >= 3, style.name  # WCAG 2, graphical objects


def test_both_draw_what_the_chart_says():
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
    assert [note["text"] for note in drawn["layout"]["annotations"]] == ["plain", "a goal"]
    assert png(Chart("a", "b", [panel])).startswith(b"\x89PNG")
