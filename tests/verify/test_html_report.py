"""The report as a page, opened in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from verify import graph_faults as faults
from verify.graph_faults import spoil

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.verify import verify_bundle, write_html
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.long_stream import LongStream
from megalodon_deploy.verify.report import VerifyReport
from megalodon_deploy.verify.report_plots import layer_plot
from megalodon_deploy.verify.tolerance import KINDS

CANDIDATE = "onnxruntime"
MEASURE = """<script>
const plots = [...document.querySelectorAll("svg.plot")].map(svg => {
  const frame = svg.getBoundingClientRect();
  const inside = [...svg.querySelectorAll("circle, text, polyline")].every(item => {
    const box = item.getBoundingClientRect();
    return box.left >= frame.left - 2 && box.right <= frame.right + 2
      && box.top >= frame.top - 2 && box.bottom <= frame.bottom + 2;
  });
  return {width: frame.width, height: frame.height, dots: svg.querySelectorAll("circle").length, inside,
    letters: svg.querySelector("text.tick").getBoundingClientRect().height,
    name: svg.getAttribute("aria-label"), colour: getComputedStyle(svg.querySelector("circle")).fill};
});
const badge = document.getElementById("verdict");
document.body.dataset.found = JSON.stringify({plots, verdict: badge.innerText, badge: getComputedStyle(badge).color,
  overflow: document.documentElement.scrollWidth - innerWidth, text: document.body.innerText.length});
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def right(report: VerifyReport, long_stream: LongStream) -> VerifyReport:
    return dataclasses.replace(report, long_stream=long_stream)


@pytest.fixture(scope="module")
def wrong(bundle: Bundle, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> VerifyReport:
    spoilt = spoil(bundle, tmp_path_factory.mktemp("spoilt") / "bundle", faults.rotate_from_the_wrong_row)
    return verify_bundle(spoilt, ckpt=checkpoint, bisect=True)


def open_page(browser: str, report: VerifyReport, directory: Path, *options: str) -> dict[str, object]:
    """What a browser shows: measured by a script that is in the test's copy of the page only."""
    write_html(report, directory / "report.html")
    page = (directory / "report.html").read_text()
    (directory / "measured.html").write_text(page.replace("</body>", MEASURE))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory / 'profile'}"]
    command += ["--enable-logging=stderr", "--window-size=1000,2000", *options]
    command += ["--dump-dom", (directory / "measured.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r'data-found="([^"]*)"', done.stdout)
    return json.loads(found.replace("&quot;", '"').replace("&amp;", "&"))


def test_a_browser_shows_verdict_and_plots(browser: str, right: VerifyReport, tmp_path: Path) -> None:
    found = open_page(browser, right, tmp_path)
    assert found["verdict"] == "PASSED"
    assert found["badge"] == "rgb(26, 127, 75)"
    assert found["overflow"] <= 0
    plots = found["plots"]
    assert len(plots) == 1 + len(right.candidates) + 5, "position, layers, long streams"
    for plot in plots:
        assert plot["inside"], plot["name"]
        assert plot["width"] > 600
        assert plot["height"] > 200
        assert plot["dots"] > 2
        assert plot["colour"] != "rgb(0, 0, 0)"


def test_a_narrow_screen_shows_verdict_and_letters(browser: str, right: VerifyReport, tmp_path: Path) -> None:
    (text,) = right.text
    long_path = dataclasses.replace(text, text="/a/path" * 20)
    found = open_page(browser, dataclasses.replace(right, text=(long_path,)), tmp_path, "--window-size=500,2000")
    assert found["verdict"] == "PASSED"
    assert found["overflow"] <= 0
    for plot in found["plots"]:
        assert plot["letters"] > 10, plot["name"]
    page = (tmp_path / "report.html").read_text()
    assert page.index('class="bar ok"') < page.index('<td class="number">')


def test_many_layers_are_told_apart(right: VerifyReport) -> None:
    """Of a large model with quantised keys and values: one colour for each kind, as many numbers as there is room."""
    kinds = [kind for kind in KINDS if kind != "activation"]
    findings = [
        dataclasses.replace(right.findings[0], tensor=f"present_{kind}.{layer}", kind=kind)
        for kind in kinds
        for layer in [*range(48), "final"]
    ]
    svg = layer_plot([*findings, dataclasses.replace(right.findings[0], tensor="logits", kind="logits")], CANDIDATE)
    assert len(set(re.findall(r'class="line (s\d)"', svg))) == len(kinds)
    ticks = re.findall(r'class="tick x" x="([\d.]+)" y="[\d.]+">(\w+)<', svg)
    assert [name for _, name in ticks] == [*(str(layer) for layer in range(0, 48, 4)), "end"]
    places = [float(place) for place, _ in ticks]
    assert min(second - first for first, second in pairwise(places)) > 30


def test_a_browser_shows_what_failed(browser: str, wrong: VerifyReport, tmp_path: Path) -> None:
    found = open_page(browser, wrong, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert found["verdict"] == "FAILED"
    assert found["overflow"] <= 0
    assert any("along the graph" in plot["name"] for plot in found["plots"])
    assert all(plot["inside"] for plot in found["plots"])
    page = (tmp_path / "report.html").read_text()
    for words in ("RoPE offset at a chunk edge", "layers.0.mega.attention.query", "first tensor out of tolerance"):
        assert words in page


def test_the_page_needs_nothing_from_outside(right: VerifyReport, tmp_path: Path) -> None:
    write_html(right, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"(?:src|href|url)\s*[=(]", page)
    assert "http" not in page
    for words in (right.bundle["fingerprint"][:16], *right.versions.values(), *right.machine.values()):
        assert str(words) in page.replace("&#x27;", "'")
    for schedule in right.schedules:
        assert schedule.name in page
    for item in right.not_run:
        assert item.what in page


def test_names_from_files_are_text_not_markup(right: VerifyReport, tmp_path: Path) -> None:
    bundle = right.bundle | {"name": "<script>alert(1)</script>"}
    finding: Finding = dataclasses.replace(right.findings[0], candidate="<b>", problem="<img src=x>")
    write_html(dataclasses.replace(right, bundle=bundle, findings=(finding,)), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>:" not in page
    assert "&lt;script&gt;" in page
