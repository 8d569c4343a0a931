"""The pages in a browser that has no network: drawn, whole, and readable everywhere."""

import io
import re
import shutil

import pytest
from rich.console import Console
from study.made_up import HOSTILE, hostile, judgements, story
from study.small import small_data, small_plan, studied

from batchnorm.study.claims import all_claims
from batchnorm.study.compare import compare
from batchnorm.study.report import write
from batchnorm.study.store import Store

api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: The width and the height of plots, and how far each is from the end of its panel.
SIZES = """(selector) => [...document.querySelectorAll(selector)]
    .filter((plot) => plot.offsetParent)
    .map((plot) => {
        const [inner, outer] = [plot.querySelector("svg.main-svg"), plot.closest(".panel")]
            .map((each) => each?.getBoundingClientRect());
        return [inner?.width ?? 0, inner?.height ?? 0, outer.right - (inner?.right ?? 0)];
    })"""
#: What is written into plots and reaches out of them.
CLIPPED = """() => [...document.querySelectorAll(".plot")]
    .filter((plot) => plot.offsetParent)
    .flatMap((plot) => {
        const room = plot.getBoundingClientRect();
        return [...plot.querySelectorAll("text")]
            .filter((text) => {
                const { left, right, top, bottom, width } = text.getBoundingClientRect();
                return width && (left < room.left - 1 || right > room.right + 1
                    || top < room.top - 1 || bottom > room.bottom + 1);
            })
            .map((text) => text.textContent);
    })"""


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write(tmp_path_factory.mktemp("study"), story("digits", judgements()[:-1]))


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    return write(tmp_path_factory.mktemp("evil"), story(HOSTILE, [hostile()], HOSTILE))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Every claim of the study, of one network after a few steps; and the page of it."""
    folder, data = tmp_path_factory.mktemp("real"), small_data()
    made = small_plan(data, steps=40)
    with Store(folder) as store:
        told = [
            studied(claim, "relu" if "relu" in claim.parts else claim.parts[0], made, data, store)
            for claim in all_claims()
        ]
    return told, write(folder, story("digits", told))


@pytest.fixture
def visit(browser):
    """Open a file, and assert at the end that nothing went wrong on the page."""
    contexts, wrong = [], []

    def visited(path, width=1200, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        address = path.as_uri()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append("dialog"), dialog.dismiss()))
        page.on("request", lambda each: each.url != address and wrong.append(each.url))
        page.goto(address)
        return page

    yield visited
    for context in contexts:
        context.close()
    assert [each for each in wrong if not each.startswith("data:image/png;base64,")] == []


def drawn(page, selector=".plot"):
    """Go through the page, so that everything in it is drawn."""
    for plot in page.query_selector_all(selector):
        if plot.is_visible():
            plot.scroll_into_view_if_needed()
            plot.wait_for_selector("svg.main-svg", state="attached", timeout=5000)


@pytest.mark.parametrize("width", [1200, 400])
def test_every_measured_claim_has_its_picture(visit, report, width):
    page = visit(report, width)
    drawn(page)
    measured = [judgement.claim.name for judgement in judgements()[:-1] if judgement.charts]
    assert len(measured) == 3
    for name in measured:
        sizes = page.evaluate(SIZES, f"#{name} .plot")
        assert sizes, name
        for across, high, room in sizes:
            assert across > 250
            assert high > 250
            assert room >= -0.5  # it ends where its panel ends
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate("document.scrollingElement.scrollWidth") == width


@pytest.mark.parametrize("width", [1200, 400])
def test_so_has_every_claim_of_the_study(visit, real, width):
    told, path = real
    page = visit(path, width)
    drawn(page)
    measured = [judgement.claim.name for judgement in told if judgement.answer != "not measured"]
    assert len(told) == len(page.query_selector_all("main > section"))
    assert len(measured) >= len(told) - 3
    for name in measured:
        sizes = page.evaluate(SIZES, f"#{name} .plot")
        assert sizes, name
        for across, high, room in sizes:
            assert min(across, high) > 250, name
            assert room >= -0.5, name
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate("document.scrollingElement.scrollWidth") == width


@pytest.mark.parametrize(("name", "width"), [("report", 320), ("evil", 400), ("evil", 1200)])
def test_the_page_is_as_wide_as_its_window(visit, request, name, width):
    page = visit(request.getfixturevalue(name), width)
    drawn(page)
    for details in page.query_selector_all("details"):
        details.evaluate("(details) => { details.open = true }")
    assert page.evaluate("document.scrollingElement.scrollWidth") == width


def shown(page, figure):
    return page.eval_on_selector_all(
        f"#figure-{figure} .panel",
        "(panels) => panels.filter((each) => each.offsetParent).map((each) => each.innerText)",
    )


def titles(page, figure):
    return [text.split("\n")[0] for text in shown(page, figure)]


def test_a_reader_chooses(visit, report):
    page = visit(report)
    assert titles(page, "does_not_hold-parts") == ["sigmoid, a", "sigmoid, b"]
    page.select_option("#figure-does_not_hold-parts select", "conv")
    assert titles(page, "does_not_hold-parts") == ["conv, a", "conv, b"]
    page.select_option("#figure-does_not_hold-parts select", "")
    assert len(titles(page, "does_not_hold-parts")) == 6
    drawn(page, "#figure-does_not_hold-parts .plot")
    assert titles(page, "depends-choices") == ["sigmoid, 2"]
    page.select_option('#figure-depends-choices [data-name="choice"]', "1")
    assert titles(page, "depends-choices") == ["sigmoid, 1"]
    page.select_option('#figure-depends-choices [data-name="part"]', "relu")
    assert titles(page, "depends-choices") == ["relu, 1"]
    drawn(page, "#figure-depends-choices .plot")
    page.select_option('#figure-depends-choices [data-name="choice"]', "3")
    assert titles(page, "depends-choices") == []
    assert page.is_visible("#figure-depends-choices >> text=This was not tried.")


def luminance(colour):
    channels = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("scheme", "dark"), [("dark", True), ("light", False)])
def test_text_is_read_in_the_dark_and_in_the_light(visit, report, scheme, dark):
    page = visit(report, color_scheme=scheme)
    drawn(page, "section[id=holds] .plot")

    def colours(selector, what):
        # A canvas turns any way of writing a colour into numbers.
        return page.eval_on_selector_all(
            selector,
            """(all, what) => all.map((each) => {
                const canvas = new OffscreenCanvas(1, 1).getContext("2d");
                canvas.fillStyle = getComputedStyle(each)[what];
                canvas.fillRect(0, 0, 1, 1);
                return canvas.getImageData(0, 0, 1, 1).data.join();
            })""",
            what,
        )

    (ground,) = set(colours("body", "backgroundColor"))
    assert (luminance(ground) < 0.05) == dark
    for selector, what in (
        ("p, h1, h2, td, code, figcaption", "color"),
        (".plot .annotation-text", "fill"),
        (".plot .xtick text, .plot .ytitle", "fill"),
    ):
        found = colours(selector, what)
        assert found
        for colour in set(found):
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (selector, colour)


def test_paper_has_all_parts_and_cuts_nothing_off(visit, report):
    page = visit(report, color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.set_viewport_size({"width": 700, "height": 1000})  # A4 or Letter, within margins
    page.emulate_media(media="print")
    assert titles(page, "does_not_hold-parts") == [
        f"{part}, {x}" for x in "ab" for part in ("sigmoid", "conv", "relu")
    ]
    assert titles(page, "depends-choices") == ["sigmoid, 2", "conv, 2", "relu, 2"]
    sizes = page.evaluate(SIZES, ".plot")
    assert len(sizes) == 2 + 2 + 6 + 3 + 1
    assert all(across == 330 and high > 250 and room >= -0.5 for across, high, room in sizes)
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 700
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.is_visible("select")
    assert page.locator(".numbers table").count() == page.locator(".numbers table:visible").count()
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 1200, "height": 900})
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.select_option("#figure-does_not_hold-parts select", "conv")
    drawn(page)
    assert all(
        across > 400 for across, *_ in page.evaluate(SIZES, "#figure-does_not_hold-parts .plot")
    )


def test_a_name_is_text_in_a_picture_too(visit, evil):
    page = visit(evil)
    drawn(page)
    assert page.query_selector("img, a:not([href^='#'])") is None
    assert "<img src=x onerror=alert(1)>" in page.text_content("h1")
    assert "<a href='http://x'>y</a>" in page.text_content(".plot")
    assert page.query_selector(".plot a") is None
    box = page.query_selector(".plot .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + box["height"] - 3)
    hint = page.wait_for_selector(".hovertext", state="attached").text_content()
    assert "<a href='http://x'>y</a>" in hint
    assert "$x^ %{y}" in hint


def test_a_comparison_is_whole_too(visit, report, evil, tmp_path):
    path = tmp_path / "compare.html"
    compare(report.parent, evil.parent, path, console=Console(file=io.StringIO()))
    for width in (1200, 400):
        page = visit(path, width, color_scheme="dark")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        images = page.eval_on_selector_all("img", "(all) => all.map((each) => each.naturalWidth)")
        assert len(images) == 5 + 1
        assert min(images) > 300
