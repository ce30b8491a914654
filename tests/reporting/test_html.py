import json
import re
import shutil
import subprocess

import pytest

from atr.reporting import html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROBE = """<script>addEventListener("load", () => {
  const pictures = [...document.images].map(picture => [picture.naturalWidth, picture.clientWidth]);
  const overflow = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.probe = JSON.stringify({pictures, overflow, title: document.title});
})</script>"""


@pytest.fixture(scope="session")
def page(built):
    return html.render_html(built)


def test_nothing_is_fetched(page):
    assert set(re.findall(r'<img src="([^,]*),', page)) == {"data:image/png;base64"}
    assert not re.search(r"https?:|<link|<script|@import|url\(", page)


def test_text_of_the_data_is_escaped(page, built):
    assert "&lt;script&gt;document.title" in page
    assert page.count("&lt;script&gt;") == len(built.cards)


def test_every_table_and_headline_is_there(page, built):
    assert page.count("<table") == len(built.scores) + len(built.differences.tables) + 4
    for sentence in (*built.headlines, *built.differences.sentences):
        assert sentence in page
    for heading in (
        "Adaptive against fixed counts",
        "Without a language model",
        "<h2>Latency",
        "<h2>Robustness",
    ):
        assert heading not in page


def test_all_sections_are_there_if_everything_was_measured(everything):
    page = html.render_html(everything)
    assert page.count("<table") == len(everything.scores) + len(everything.differences.tables) + 12
    for heading in (
        "Adaptive against fixed counts",
        "Without a language model",
        "<h2>Latency</h2>",
        "<h2>Robustness to deployment</h2>",
    ):
        assert heading in page
    parts = ("groups", "benchmarks", "pages", "cards")
    shown = sum(len(getattr(everything, part)) for part in parts) + len(everything.differences.pictures)
    assert page.count("<img") == shown + 3, "and overlap, components and robustness"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_all_pictures_and_no_sideways_scrolling(page, built, tmp_path, width):
    probed = tmp_path / "report.html"
    probed.write_text(page.replace("</body>", f"{PROBE}</body>"))
    place = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", f"file://{probed}"]
    command = [CHROMIUM, *QUIET, "--dump-dom", *place]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    seen = json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace("&quot;", '"'))
    parts = (built.groups, built.differences.pictures, built.benchmarks, built.pages, built.cards)
    assert len(seen["pictures"]) == sum(map(len, parts)) + 1
    assert all(natural > 0 and shown > 100 for natural, shown in seen["pictures"])
    assert seen["overflow"] <= 0
    assert seen["title"] == "Adaptive visual token reduction"
