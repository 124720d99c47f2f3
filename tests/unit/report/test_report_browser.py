"""The report in a real browser: what it shows at a desktop's and a phone's width, in light and dark, on hover and on paper."""

import html
import json
import re

import matplotlib.image
import numpy as np
import pytest
from test_report import CPU, Store, batches_of

from browser import framed, needs_browser, picture, printed, rendered

pytestmark = needs_browser

# Asked inside the page: how wide it is, what shows, and what a pointer over the middle of a point makes it say.
ASK = """
<script>addEventListener("load", () => {
  const plot = document.querySelector('[aria-label^="How fast"] svg'), use = plot.querySelectorAll("g[clip-path] use");
  const point = [...use].at(-1), box = point.getBoundingClientRect();
  const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true };
  point.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.getElementById("tip"), said = tip.hidden ? "" : tip.textContent, place = tip.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointerleave", at));
  const answer = { said, inside: place.left >= 0 && place.right <= innerWidth, gone: tip.hidden, width: innerWidth };
  answer.wide = document.documentElement.scrollWidth;
  answer.shown = document.querySelector("main").innerText;
  answer.ink = getComputedStyle(plot.querySelector("text")).fill;
  answer.titles = plot.querySelectorAll("title").length;
  dispatchEvent(new Event("beforeprint"));
  answer.all = document.querySelector("main").innerText;
  parent.postMessage(JSON.stringify(answer), "*");
});</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    store = (
        Store(tmp_path_factory.mktemp("shown")).job({"s0": batches_of("s0", 60)}).dataset("a", input="in/" + "x" * 90)
    )
    store.embeddings(30)
    store.summarize()
    return store.folder / "report" / "index.html"


def ask(page, width, dark=False):
    asking = page.with_name("ask.html")
    asking.write_text(page.read_text().replace("</body>", ASK + "</body>"))
    answer = re.search("<pre>(.+)</pre>", rendered(framed(asking, width), dark=dark), re.DOTALL)[1]
    return json.loads(html.unescape(answer))


def test_a_desktop_shows_the_facts_and_a_point_says_what_it_is(page):
    found = ask(page, 1280)
    assert f"residues per second on {CPU} in float32" in found["shown"]
    for title in ("How fast, against length", "What does no_grad save?", "A first look at the embeddings"):
        assert title in found["shown"]
    assert re.fullmatch(r"\d+ sequences? of [\d,]+ residues on average: [\d,]+ residues/s", found["said"])
    assert f"<title>{found['said']}</title>" in page.read_text()
    assert found["gone"]
    assert found["titles"] == 0  # or the browser would say it a second time
    assert found["shown"].index("How long they are") < found["shown"].index("How fast, against length")
    assert "The longest protein, by the formula" not in found["shown"]  # details are closed
    assert "The longest protein, by the formula" in found["all"]  # and open on paper


def test_a_phone_needs_no_sideways_scrolling(page):
    picture(framed(page, 390), page.with_name("phone.png"), 500, 4000, dark=True)
    found = ask(page, 390, dark=True)
    assert found["wide"] <= found["width"] == 390
    assert found["inside"]
    light = ask(page, 390)["ink"]
    assert (
        sum(map(int, re.findall(r"\d+", found["ink"])[:3])) > 600 > 200 > sum(map(int, re.findall(r"\d+", light)[:3]))
    )
    shot = matplotlib.image.imread(page.with_name("phone.png"))[:, :390, :3]
    assert shot.mean() < 0.35
    assert np.ptp(shot) > 0.8


def test_pictures_and_paper_are_not_empty(page):
    shot = matplotlib.image.imread(picture(page, page.with_name("desktop.png"), 1280, 2000))[..., :3]
    assert shot.mean() > 0.8
    middle = shot[400:1800].reshape(14, 100, 1280, 3)  # something is drawn in every strip of a hundred pixels
    assert (middle.std(axis=(1, 2, 3)) > 0.02).all()
    assert printed(page, page.with_name("page.pdf")).stat().st_size > 50_000
