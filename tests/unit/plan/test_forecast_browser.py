"""The forecast's page in a real browser: what it shows at a desktop's and a phone's width, in light and dark, and on paper."""

import re

import matplotlib.image
import numpy as np
import pytest

from browser import framed, needs_browser, picture, printed, rendered
from lengthwise.plan import forecast
from lengthwise.plan.planner import Sizes

pytestmark = needs_browser
LONG = "a_dataset_with_a_name_that_is_much_too_long_for_any_screen_of_a_phone"
# What a page says of itself to the frame that it is in.
ASK = """<script>addEventListener("load", () => parent.postMessage(
    document.documentElement.scrollWidth + " of " + innerWidth + "\\n" + document.querySelector("main").innerText, "*"));
</script>"""


@pytest.fixture(scope="module")
def page(small_store, random_proteins, tmp_path_factory):
    store = small_store()
    store.ingest(LONG, random_proteins(40, 20, 900) | {"long": "M" * 1500, "bad": "M-K"})
    store.ingest("b", {"one": "MKV"})
    folders = {name: store.inputs(name) for name in store.datasets}
    made = forecast.forecast(store.path, store.settings, folders, Sizes(1200, 1 << 30))
    path = tmp_path_factory.mktemp("shown") / "page.html"
    path.write_text(forecast.page(made) + ASK)
    return path


@pytest.mark.parametrize("width", [1280, 390])
def test_a_screen_shows_the_answers_first_and_needs_no_sideways_scrolling(page, width):
    text = re.search("<pre>(.+)</pre>", rendered(framed(page, width), width=max(width, 500)), re.DOTALL)[1]
    size, shown = text.split("\n", 1)
    needed, wide = map(int, size.split(" of "))
    assert needed <= wide == width
    answers = [shown.upper().find(f"\n{part}\n") for part in ("DISK", "MEMORY", "TIME", LONG.upper(), "B")]
    assert -1 < answers[0] < answers[1] < answers[2] < answers[3] < answers[4]
    assert "42 records = 41 accepted + 0 duplicate + 1 rejected (1 invalid_byte)" in shown
    assert "1 longer than the 1,022" in shown
    assert "0 rejected. 3 residues, median 3." in shown


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_show_bars_and_tables_in_light_and_dark(page, dark):
    for width in (1280, 390):
        path = page.with_name(f"{width}-{dark}.png")
        shot = matplotlib.image.imread(picture(framed(page, width), path, max(width, 500), 1600, dark))[:, :width, :3]
        assert (shot.mean() < 0.35) if dark else (shot.mean() > 0.8)
        strips = shot[:1500].reshape(15, 100, width, 3)  # something is written in every strip of a hundred pixels
        assert (strips.std(axis=(1, 2, 3)) > 0.01).all()
        assert np.ptp(shot) > 0.7
    assert printed(page, page.with_name("page.pdf")).stat().st_size > 20_000
