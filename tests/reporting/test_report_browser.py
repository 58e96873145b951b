"""The page in headless Chromium: by mouse, by keyboard, on a phone, in the dark and on paper."""

from __future__ import annotations

import shutil

import pytest
from browser import Browser, chromium
from realistic_results import failed, realistic, run_of

from spp.reporting.inputs import Benchmark
from spp.reporting.report import write_report

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on PATH")

_FOCUS = "document.activeElement"
_LONG = "a-rather-long-name-of-a-run-with-everything-in-it-rank-16-learning-rate-0.02-seed-0"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of one run and one of three; in both, a tensor's proof is broken."""
    folder = tmp_path_factory.mktemp("pages")
    unlike = realistic() | {"gap_closed": None}
    unlike["protocol"]["evaluation"]["window"] = 2048
    rows = [{"date": "d", "device": "cpu", "hardware": "h", "x_ms": str(n)} for n in (3, 1, 2)]
    one = [run_of(failed(), "broken")]
    for name, runs in {"one": one, "three": [run_of(realistic(), "fine"), *one, run_of(unlike, _LONG)]}.items():
        write_report(runs, folder / f"{name}.html", [Benchmark("speed", rows)])
    return folder


@pytest.fixture
def page(request, browser, pages):
    """That of three runs, unless a test says another, open on a desktop; nothing in it may complain or fetch."""
    path = pages / f"{getattr(request, 'param', 'three')}.html"
    browser.complaints.clear()
    browser.requests.clear()
    browser.look(width=1280)
    browser.open(path)
    yield browser
    assert browser.complaints == []
    assert browser.requests == [path.as_uri()]


both = pytest.mark.parametrize("page", ["one", "three"], indirect=True)


def table(caption: str) -> str:
    found = f"[...document.querySelectorAll('table')].find(t => t.caption.textContent.startsWith('{caption}'))"
    return f"({found})"


def button(caption: str, text: str) -> str:
    return f"[...{table(caption)}.querySelectorAll('th button')].find(b => b.textContent === '{text}')"


def column(browser: Browser, caption: str, index: int) -> list[str]:
    return browser.evaluate(f"[...{table(caption)}.tBodies[0].rows].map(row => row.cells[{index}].innerText)")


def sorted_by(browser: Browser, caption: str) -> list[list[str]]:
    """Heading and direction of every column that the table says it is sorted by."""
    headings = f"[...{table(caption)}.querySelectorAll('th[aria-sort]')]"
    return browser.evaluate(f"{headings}.map(th => [th.textContent, th.getAttribute('aria-sort')])")


def test_tables_are_sorted_by_a_click(page):
    page.click(button("42 tensors", "Offenders"))
    assert sorted_by(page, "42 tensors") == [["Offenders", "descending"]]
    page.click(button("speed", "x, ms"))
    assert column(page, "speed", 0) == ["3", "2", "1"]
    page.click(button("speed", "x, ms"))
    assert column(page, "speed", 0) == ["1", "2", "3"]
    assert sorted_by(page, "speed") == [["x, ms", "ascending"]]


def test_the_failed_tensor_comes_first(page):
    broken = "[...document.querySelectorAll('.sortable:has(.failed)')].at(-1)"
    page.click(f"[...{broken}.querySelectorAll('th button')].find(b => b.textContent === 'Offenders')")
    first = page.evaluate(f"{broken}.tBodies[0].rows[0].innerText")
    assert first.startswith("model.layers.1.mlp.up_proj.weight failed")


def test_tables_are_sorted_by_the_keyboard(page):
    page.evaluate(f"{button('speed', 'x, ms')}.closest('.scroll').focus()")
    page.press("Tab")
    assert page.evaluate(f"{_FOCUS}.textContent") == "x, ms"
    assert page.evaluate(f"getComputedStyle({_FOCUS}).outlineStyle") == "solid"
    page.press("Enter")
    assert column(page, "speed", 0) == ["3", "2", "1"]
    page.press(" ")
    assert column(page, "speed", 0) == ["1", "2", "3"]
    assert page.evaluate(f"{_FOCUS}.textContent") == "x, ms"


@pytest.mark.parametrize("page", ["one"], indirect=True)
def test_everything_that_acts_is_reached_by_the_keyboard(page):
    acting = page.evaluate("document.querySelectorAll('a, button, summary, [tabindex=\"0\"]').length")
    reached = set()
    for _ in range(acting):
        page.press("Tab")
        reached.add(page.evaluate(f"[...document.querySelectorAll('*')].indexOf({_FOCUS})"))
    assert len(reached) == acting


def test_runs_are_sorted_by_a_click(page):
    page.click(button("3 runs", "Gap closed"))
    assert column(page, "3 runs", 8)[-1] == "not defined"
    page.click(button("3 runs", "Run"))
    assert [name[0] for name in column(page, "3 runs", 0)] == ["1", "2", "3"]


@both
def test_charts_are_there_and_named(page):
    charts = "[...document.querySelectorAll('svg[role=img]')]"
    runs = page.evaluate("document.querySelectorAll('.run').length")
    assert page.evaluate(f"{charts}.length") == (5 if not runs else 2 + 3 * 5)
    assert page.evaluate(f"{charts}.every(svg => svg.getBoundingClientRect().height > 50)")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") in ("image", "img")]
    named = [node for node in images if node["name"]["value"] and node["description"]["value"]]
    assert len(named) >= page.evaluate(f"{charts}.length")


@both
def test_nothing_is_wider_than_the_window(page):
    labels = """[...document.querySelectorAll('svg[role=img]')].every(svg => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].every(text => {
            const own = text.getBoundingClientRect();
            return own.left >= box.left - 1 && own.right <= box.right + 1;
        });
    })"""
    for width in (320, 400, 800, 1280):
        page.look(width=width)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(labels), f"a label is cut off at {width} pixels"


def test_the_dark_theme_has_a_dark_background(page):
    luminance = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)"
    assert page.evaluate(luminance) > 700
    page.look(width=1280, dark=True)
    assert page.evaluate(luminance) < 100


@both
def test_the_page_prints_whole_on_a4_in_light_colours(page, tmp_path):
    page.look(width=1280, dark=True)
    page.print(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.call("Emulation.setEmulatedMedia", media="print")
    page.call("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)  # A4
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    cut = "[...document.querySelectorAll('.tall')].some(part => part.scrollHeight > part.clientHeight + 2)"
    assert not page.evaluate(cut)
