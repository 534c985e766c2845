"""The HTML report looked at in headless Chromium, and the static figures opened again."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from neuron_minimax.studies.experts.report import pack, render_report, write_plots
from neuron_minimax.studies.experts.statistics import Analysis
from neuron_minimax.studies.experts.trace import Trace

LAYERS = 6
TOKENS = 30
EXPERTS = 16
TOP_K = 3
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Acts as a visitor would, and leaves what it saw in the page.
VISITOR = """
<script>
const seen = {};
function hover(canvas, x, y) {
  const box = canvas.getBoundingClientRect();
  const at = { clientX: box.left + x, clientY: box.top + y, bubbles: true };
  canvas.dispatchEvent(new PointerEvent("pointermove", at));
  return document.getElementById("tip").textContent;
}
const map = maps[0], plot = map.plot;
const middle = (row, column) => [
  plot.x + ((column + 0.5 - map.view.x) / map.view.width) * plot.width,
  plot.y + ((row + 0.5 - map.view.y) / map.view.height) * plot.height,
];
seen.ready = document.documentElement.dataset.ready;
seen.theme = document.documentElement.dataset.theme;
seen.hover = [[0, 0], [3, 7], [5, 15]].map(
  ([row, column]) => hover(map.canvas, ...middle(row, column)));
const before = map.view.width;
const corner = map.canvas.getBoundingClientRect();
const wheel = { clientX: corner.left + 300, clientY: corner.top + 60 };
map.canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -1, cancelable: true, ...wheel }));
seen.zoomed = map.view.width / before;
seen.zoomedHover = hover(map.canvas, ...middle(2, 7));
map.canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "0" }));
seen.reset = map.view.width === before;
document.querySelector("#tokens span").click();
seen.choices = [...document.querySelectorAll("#choices tr")].map((row) => row.textContent);
seen.text = document.getElementById("tokens").textContent;
seen.facts = [...document.querySelectorAll("dd")].map((fact) => fact.textContent);
const select = document.querySelector("select");
select.value = "1";
select.dispatchEvent(new Event("change"));
seen.classes = [...select.options].map((option) => option.text);
seen.picked = [...document.querySelectorAll("h2")].map((heading) => heading.textContent);
const held = document.querySelector(".cut select"), slider = document.querySelector(".cut input");
const plane = (axis, at, row, column) => {
  held.value = axis;
  held.dispatchEvent(new Event("change"));
  slider.value = at;
  slider.dispatchEvent(new Event("input"));
  const shown = maps[maps.length - 1], { plot, view } = shown;
  return hover(
    shown.canvas,
    plot.x + ((column + 0.5) / view.width) * plot.width,
    plot.y + ((row + 0.5) / view.height) * plot.height,
  );
};
seen.cut = {};
for (const [axis, rows, columns] of [["layer", 30, 16], ["token", 6, 16], ["expert", 6, 30]])
  seen.cut[axis] = Array.from({ length: rows * columns }, (_, i) =>
    plane(axis, 5, Math.floor(i / columns), i % columns));
seen.said = document.querySelector(".cut output").textContent;
seen.most = slider.max;
seen.focus = (() => { slider.focus(); return document.activeElement === slider; })();
seen.paper = getComputedStyle(document.body).backgroundColor;
document.getElementById("theme").click();
seen.otherTheme = document.documentElement.dataset.theme;
seen.otherPaper = getComputedStyle(document.body).backgroundColor;
seen.wide = document.documentElement.scrollWidth <= innerWidth;
const { width, height } = map.canvas, colours = new Set();
const image = map.canvas.getContext("2d").getImageData(0, 0, width, height).data;
for (let i = 0; i < image.length; i += 4)
  colours.add((image[i] << 16) | (image[i + 1] << 8) | image[i + 2]);
seen.colours = colours.size;
const result = document.createElement("pre");
result.id = "seen";
result.textContent = JSON.stringify(seen);
document.body.append(result);
</script>
"""


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    generator = np.random.default_rng(0)
    scores = generator.random((LAYERS, TOKENS, EXPERTS)).astype(np.float16)
    bias = generator.normal(7, 0.3, (LAYERS, EXPERTS)).astype(np.float32)
    index = np.argsort(-(scores + bias[:, None]), axis=2)[..., :TOP_K].astype(np.int16)
    affinity = np.take_along_axis(scores, index.astype(int), axis=2).astype(np.float32)
    texts = tuple(
        ["<b>&", " 42", " word", "</script>", "東京", "\n"][token % 6] for token in range(TOKENS)
    )
    trace = Trace(
        tokens=np.arange(TOKENS, dtype=np.int32),
        is_decode=np.arange(TOKENS) >= 20,
        expert_index=index,
        affinity=affinity / affinity.sum(axis=2, keepdims=True),
        scores=scores,
        bias=bias,
        texts=texts,
        prompt="What is </script> <b>?\nA second line.",
        name="a <prompt>",
    )
    similar = np.stack([np.corrcoef(generator.random((EXPERTS, 8))) for _ in range(LAYERS)])
    return Analysis(
        trace=trace, router_similarity=similar, expert_similarity={0: similar[0]}, permutations=49
    )


def visit(analysis: Analysis, directory: Path, theme: str) -> dict:
    page = directory / "report.html"
    page.write_text(
        render_report(analysis).replace("</body>", VISITOR + "</body>"), encoding="utf-8"
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1200,900",
        "--enable-logging=stderr",
    ]
    command = [
        CHROMIUM,
        *flags,
        f"--user-data-dir={directory}/profile",
        "--dump-dom",
        f"file://{page}#{theme}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Uncaught" not in done.stderr, done.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def seen(analysis, tmp_path_factory) -> dict:
    return visit(analysis, tmp_path_factory.mktemp("light"), "light")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_visitor_reads_values_zooms_picks_tokens_and_changes_the_theme(seen, analysis):
    assert seen["ready"] == "true"
    for text, (layer, expert) in zip(seen["hover"], [(0, 0), (3, 7), (5, 15)], strict=True):
        named, value = text.removesuffix(" of tokens").split(": ")
        assert named == f"layer {layer}, expert {expert}"
        assert float(value) == pytest.approx(analysis.frequency[layer, expert], abs=5e-3)
    assert seen["zoomed"] == pytest.approx(0.8)
    assert seen["zoomedHover"].startswith("layer 2, expert 7")
    assert seen["reset"] is True
    assert len(seen["choices"]) == LAYERS
    experts = analysis.trace.expert_index[4, 0].tolist()
    weights = analysis.trace.affinity[4, 0].tolist()
    wanted = "layer 4" + "".join(
        f"{expert} {weight:.2f}" for expert, weight in zip(experts, weights, strict=True)
    )
    assert seen["choices"][4] == wanted
    assert seen["text"] == "".join(analysis.trace.texts)
    assert seen["facts"][0] == analysis.trace.prompt
    assert [name.removeprefix("Tokens of class ") for name in seen["classes"]] == list(
        analysis.by_class
    )
    assert seen["classes"][1] in seen["picked"]
    assert (seen["theme"], seen["otherTheme"]) == ("light", "dark")
    assert (seen["paper"], seen["otherPaper"]) == ("rgb(255, 255, 255)", "rgb(20, 24, 29)")
    assert seen["wide"], "the page scrolls sideways"
    assert seen["colours"] > 10


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_planes_through_experts_tokens_and_layers_hold_every_weight(seen, analysis):
    trace = analysis.trace
    weight = np.full((LAYERS, TOKENS, EXPERTS), np.nan)
    np.put_along_axis(weight, trace.expert_index.astype(int), trace.affinity, axis=2)
    planes = {"layer": weight[5], "token": weight[:, 5], "expert": weight[:, :, 5]}
    for axis, wanted in planes.items():
        values = [text.removesuffix(" weight").rpartition(": ")[2] for text in seen["cut"][axis]]
        found = np.array([np.nan if value == "none" else float(value) for value in values])
        assert np.allclose(found.reshape(wanted.shape), wanted, atol=1e-3, equal_nan=True)
    assert seen["cut"]["expert"][TOKENS + 3].startswith('layer 1, token 3 "</script>": ')
    assert (seen["said"], seen["most"], seen["focus"]) == ("expert 5", "15", True)


def test_the_page_is_read_without_scripts(analysis):
    page = render_report(analysis)
    still = page.partition("<noscript>")[2].partition("</noscript>")[0]
    assert "data:image/png;base64," in still
    table = re.findall(r"<tr><td data-head=\"layer\"><span>(\d+)</span>.*?</tr>", still)
    assert table == [str(layer) for layer in range(LAYERS)]
    first = int(analysis.frequency[0].argmax())
    assert f"<span>{first} ({analysis.frequency[0, first]:.0%})" in still
    assert "<dt>prompt</dt><dd>What is &lt;/script&gt;" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_dark_page_opens_dark(analysis, tmp_path):
    assert visit(analysis, tmp_path, "dark")["paper"] == "rgb(20, 24, 29)"


def test_the_page_needs_no_network(analysis):
    page = render_report(analysis)
    assert not re.search(r'(src="(?!data:)|href)|url\(|@import|fetch\(|https?://', page)
    assert "<title>Experts of a &lt;prompt&gt;</title>" in page


def test_packed_values_come_back_within_a_step_of_their_range():
    values = np.random.default_rng(1).normal(size=(7, 9))
    values[2, 3] = np.nan
    packed = pack(values)
    import base64

    steps = np.frombuffer(base64.b64decode(packed["base64"]), "<u2").reshape(values.shape)
    found = packed["low"] + steps / 65534 * (packed["high"] - packed["low"])
    assert steps[2, 3] == 65535
    assert (
        np.nanmax(np.abs(np.where(steps == 65535, np.nan, found) - values))
        <= np.nanmax(values) / 30000
    )
    assert pack(np.zeros((2, 2)))["high"] == 1.0


def test_every_figure_is_written_in_both_forms_and_themes(analysis, tmp_path):
    from matplotlib.image import imread

    paths = write_plots(analysis, tmp_path)
    names = {path.name.split(".")[0] for path in paths}
    assert names >= {
        "activation",
        "correlation_by_distance",
        "layer_correlation",
        "load",
        "coactivation",
    }
    assert names >= {"router_similarity", "expert_similarity_0"}
    for name in names:
        light, dark = (
            imread(tmp_path / f"{name}.{theme}.png")[..., :3] for theme in ("light", "dark")
        )
        assert light[0, 0].mean() > 0.9 > 0.1 > dark[0, 0].mean()
        for theme in ("light", "dark"):
            assert ElementTree.parse(tmp_path / f"{name}.{theme}.svg").getroot().tag.endswith("svg")
