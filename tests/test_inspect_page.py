"""The inspection page in a real browser: complete without network, legible wide and narrow, light
and dark.
"""

import base64
import json
import zlib

import numpy as np
import pytest

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.demo import DEMO
from neuron_minimax.inspection import charts
from neuron_minimax.inspection.precision import inspect
from tests.faults import MOE, Fault, put
from tests.webdriver import CHROMIUM, DRIVER, chromium

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"
)
DEAD = MOE + "experts.5.w2.weight"
NAN = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a checkpoint with a dead expert and a NaN code, values read."""
    directory = tmp_path_factory.mktemp("page")

    def spoil(tensors):
        put(DEAD, np.zeros_like)(tensors)
        put(
            NAN,
            lambda codes: np.where(
                np.arange(codes.size).reshape(codes.shape) == 5, np.uint8(0x7F), codes
            ),
        )(tensors)

    fault = Fault(title="two", subject="", words=(), tensors=spoil)
    found = inspect(
        Checkpoint(fault.write(directory / "<checkpoint> & co")),
        ["self_attn", "lm_head"],
        check_values=True,
    )
    path = directory / "page.html"
    path.write_text(found.render_page(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def open_browser():
    with chromium() as opener:
        yield opener


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_legible_and_fits(page, open_browser, width, scheme):
    browser = open_browser(1280, 900)
    browser.emulate_width(width, 900)
    browser.emulate_colours(scheme)
    browser.open(page.as_uri())
    assert browser.run("return document.documentElement.scrollWidth") <= width
    browser.assert_legible()
    dark = (
        browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 23)"
    )
    assert dark == (scheme == "dark")


@needs_browser
def test_every_column_can_be_read_at_400_pixels(page, open_browser):
    browser = open_browser(1280, 900)
    browser.emulate_width(400, 900)
    browser.open(page.as_uri())
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    cells = browser.run(
        """return [...document.querySelectorAll("td")].map((cell) => {
          const box = cell.firstChild.getBoundingClientRect();
          const around = cell.closest(".scroll").getBoundingClientRect();
          const name = getComputedStyle(cell, "::before").content;
          return [name, box.width > 0 && box.left >= around.left && box.right <= around.right];
        })"""
    )
    assert {'"largest code under 112"', '"highest"', '"bytes"'} <= {name for name, _ in cells}
    assert all(readable for _, readable in cells)


@needs_browser
def test_the_page_loads_nothing_and_shows_findings_first(page, open_browser):
    browser = open_browser(1280, 900)
    browser.open(page.as_uri())
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.run("return document.scripts.length") == 0
    assert browser.run("return document.querySelector('section h2').textContent") == "Findings"
    assert browser.run("return document.querySelector('h1').textContent") == "<checkpoint> & co"
    errors = browser.run(
        "return [...document.querySelectorAll('section:first-of-type li.error')].map(e => "
        "e.innerText)"
    )
    assert any("self_attn" in error for error in errors)
    assert any(NAN in error and "NaN" in error for error in errors)
    assert "expert 5 of layer 1 is dead" in browser.run("return document.body.innerText")


@needs_browser
def test_the_grid_has_a_coloured_cell_for_every_layer_of_every_kind(page, open_browser):
    browser = open_browser(1280, 900)
    browser.open(page.as_uri())
    cells = browser.run(
        "return [...document.querySelectorAll('svg.cells rect')].map(r => "
        "[r.querySelector('title').textContent, getComputedStyle(r).fill, "
        "r.getBoundingClientRect().width])"
    )
    assert len(cells) == 13 * 2
    colours = {}
    for title, fill, width in cells:
        assert width > 10
        colours.setdefault(title.split()[-1], set()).add(fill)
    assert set(colours) == {"F8_E4M3", "BF16", "F32"}
    assert len(set.union(*colours.values())) == 3
    assert browser.run("return document.querySelector('img.heat').naturalWidth") == 8
    assert browser.run("return document.querySelector('img.heat').naturalHeight") == 2


@needs_browser
def test_every_section_is_there_and_bars_are_as_long_as_their_bytes(page, open_browser):
    browser = open_browser(1280, 900)
    browser.open(page.as_uri())
    titles = browser.run("return [...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert titles == [
        "Findings",
        "Bytes by kind of weight",
        "Precision by layer",
        "modules_to_not_convert",
        "Scales by layer",
        "Codes",
        "Expert norms",
        "Router bias",
        "Files",
    ]
    bars = dict(
        browser.run(
            "return [...document.querySelectorAll('.bar')].map(e => "
            "[e.querySelector('.name').textContent, "
            "e.querySelector('i').getBoundingClientRect().width])"
        )
    )
    assert len(bars) == 16
    experts = 16 * (128 * 256 + 2 * 4)
    query = 2 * (512 * 256 + 8 * 4)
    assert bars["q_proj"] / bars["w1"] == pytest.approx(query / experts, rel=0.01)


def test_commands_are_code_and_one_file_is_one_file(page):
    text = page.read_text(encoding="utf-8")
    assert "`" not in text
    assert "<code>neuron-minimax convert</code> writes NxDI&#x27;s own list" in text
    assert "<summary>3 files</summary>" in text
    one = inspect(Checkpoint.open(DEMO)).render_page()
    assert "<summary>1 file</summary>" in one


def test_the_page_needs_no_other_file(page):
    text = page.read_text(encoding="utf-8")
    assert "<checkpoint>" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "<script" not in text
    assert "&lt;checkpoint&gt; &amp; co" in text


def test_a_png_holds_exactly_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    data = charts.encode_png(pixels)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    start = data.index(b"IDAT") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big")
    rows = np.frombuffer(zlib.decompress(data[start : start + length]), np.uint8).reshape(5, 22)
    assert np.array_equal(rows[:, 1:].reshape(5, 7, 3), pixels)
    assert not rows[:, 0].any()
    assert charts.heat_map(np.eye(3)).startswith(
        "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()[:4]
    )


def test_a_page_without_values_says_nothing_of_them(tmp_path):
    found = inspect(Checkpoint(Fault(title="none", subject="", words=()).write(tmp_path / "c")))
    text = found.render_page()
    assert "Expert norms" not in text
    assert "Usable as it is" in text
    assert json.dumps(found.to_json())
