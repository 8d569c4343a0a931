"""Two studies side by side: what differs is marked, and a folder is not believed."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from study.made_up import HOSTILE, claim, finding, hostile, judgements, story

from batchnorm.study.claims import Judgement
from batchnorm.study.compare import compare
from batchnorm.study.report import write
from batchnorm.study.summary import NAME, read
from batchnorm.study.tasks import StudyError


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    write(folder, story("digits", word="digits"))
    return folder


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    holds, does_not, *_ = judgements()
    turned = Judgement(holds.claim, [finding("conv", (False,)), finding("elu")], holds.charts)
    told = [turned, does_not, Judgement(claim(9, "new"), [finding("conv")], []), hostile()]
    write(folder, story(HOSTILE, told, HOSTILE))
    return folder


def compared(first, second, out):
    console = Console(file=io.StringIO(), width=80)
    compare(first, second, out / "c.html", console=console)
    return console.file.getvalue(), (out / "c.html").read_text(encoding="utf-8")


def test_a_summary_is_read_as_it_was_written(first):
    found = read(first)
    assert (found.data, found.made_on["cpu"]) == ("digits", "digits")
    assert found.command == "batchnorm study --data digits"
    assert len(found.verdicts) == len(judgements())
    for verdict, judgement in zip(found.verdicts[:-1], judgements()[:-1], strict=True):
        assert verdict.name == judgement.claim.name
        assert verdict.answer == judgement.answer
        assert verdict.left_out == list(judgement.left_out)
        assert [name for name, _ in verdict.figures] == list(judgement.figures)
        assert verdict.findings == [replace(known, rows=()) for known in judgement.findings]


def test_the_table_fits_80_columns_and_marks_what_differs(first, second, tmp_path):
    shown, _ = compared(first, second, tmp_path)
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith("Side by"))
    assert "…" not in shown
    assert "\x1b" not in shown
    assert re.search(r"1\. title of holds +≠", shown)
    assert re.search(r"verdict +holds +depends", shown)
    assert not re.search(r"2\. title of does_not_hold +≠", shown)
    assert not re.search(r"9\. title of new +≠", shown)  # only one speaks of it
    effect = re.escape(finding("conv").effect)
    assert re.search(f"conv +✓ {effect} +✗ {effect}", shown)
    assert re.search(f"elu +– +✓ {effect}", shown)
    assert re.search(f"sigmoid +✓ {effect} +–", shown)
    assert "the verdicts differ: 1 of 7" in " ".join(shown.split())


def test_the_page_has_both_and_loads_nothing(first, second, tmp_path):
    _, page = compared(first, second, tmp_path)
    body = page[page.index("<body") :]
    assert "<img" not in body.replace('<img src="data:image/png;base64,', "")
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert body.count("data:image/png") == 6 + 4
    holds = re.search('(?s)<section id="claim-0">.*?</section>', page)[0]
    assert holds.count("<img") == 4
    assert holds.count("<figcaption>curves.</figcaption>") == 2
    assert "This study does not speak of it." in page


def test_a_picture_may_be_gone(first, second, tmp_path):
    folder = tmp_path / "third"
    folder.mkdir()
    (folder / NAME).write_bytes((first / NAME).read_bytes())
    _, page = compared(first, folder, tmp_path)
    assert "holds-curves: the picture is not there." in page


class TestRefused:
    """Each says in one line what it got, from which file, and the way out."""

    def refused(self, folder, *words):
        with pytest.raises(StudyError) as caught:
            read(folder)
        assert str(caught.value).isprintable()
        for word in (NAME, *words):
            assert word in str(caught.value)

    def test_no_study(self, tmp_path):
        self.refused(tmp_path, "No such file", "name the folder of a study that has ended")

    def test_a_file_in_place_of_a_folder(self, tmp_path):
        (tmp_path / "x").write_text("")
        self.refused(tmp_path / "x", "Not a directory")

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[1]", b'"a"', b"{}"]
    )
    def test_no_summary(self, tmp_path, content):
        (tmp_path / NAME).write_bytes(content)
        self.refused(tmp_path, "expected what a study writes", "run that study's command again")

    @pytest.mark.parametrize(
        ("keys", "value"),
        [
            (("data",), 1),
            (("made_on",), {"cpu": None}),
            (("claims",), {}),
            (("claims", 0), "x"),
            (("claims", 0, "number"), True),
            (("claims", 0, "title"), None),
            (("claims", 0, "answer"), "\x1b[2Jperhaps"),
            (("claims", 0, "left_out"), [1]),
            (("claims", 0, "parts", 0, "checks"), {"a": "yes"}),
            (("claims", 0, "parts", 0, "with"), 5),
            (("claims", 0, "figures", 0, "file"), "../../secret"),
            (("claims", 0, "figures", 0, "file"), "a.b"),
            (("claims", 0, "figures", 0, "file"), ""),
        ],
    )
    def test_any_other_value(self, first, tmp_path, keys, value):
        content = json.loads((first / NAME).read_text(encoding="utf-8"))
        *way, last = keys
        place = content
        for key in way:
            place = place[key]
        place[last] = value
        (tmp_path / NAME).write_text(json.dumps(content))
        self.refused(tmp_path, "expected what a study writes")

    def test_nothing_is_written_then(self, first, tmp_path):
        with pytest.raises(StudyError):
            compare(first, tmp_path, tmp_path / "c.html", console=Console(file=io.StringIO()))
        assert list(tmp_path.iterdir()) == []

    def test_a_page_in_a_folder_that_is_not_there(self, first, tmp_path):
        out = tmp_path / "no" / "c.html"
        with pytest.raises(
            StudyError, match=r"c\.html: No such file or directory; name a file in a"
        ):
            compare(first, first, out, console=Console(file=io.StringIO()))
