"""PNG and page are written, hold what they should, and survive hostile text."""

import base64
import json
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from flash_gsa.errors import UsageError
from flash_gsa.inspection import SlotActivity, save_page, save_picture
from flash_gsa.inspection import page as page_module

TOKENS = ["def", " $x$ ", "</script><script>alert(1)</script>", "\n", "", "汉", "\x00\x1b[31m", "&amp;", "<!--"]


def activity(layer=0, head=0, tokens=9, slots=5) -> SlotActivity:
    rng = np.random.default_rng(layer * 10 + head)
    read = rng.dirichlet(np.ones(slots), tokens)
    keep = rng.uniform(0, 1, (tokens, slots))
    keep[0, 0], keep[0, 1] = 0.0, 1.0
    return SlotActivity(layer, head, read, 1 - keep, keep, np.tril(rng.uniform(0, 1 / tokens, (tokens, tokens))))


def test_picture_is_a_legible_png(tmp_path, recwarn):
    save_picture(activity(), TOKENS, tmp_path / "new folder" / "slots.png", title="runs/demo")
    image = matplotlib.image.imread(tmp_path / "new folder" / "slots.png")
    assert image.shape[0] > 600
    assert image.shape[1] > 900
    assert image[..., :3].std() > 0.1
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_picture_of_many_slots_and_tokens_stays_bounded(tmp_path):
    save_picture(activity(tokens=400, slots=256), ["tok"] * 400, tmp_path / "slots.png")
    assert max(matplotlib.image.imread(tmp_path / "slots.png").shape) < 9000


class Scripts(HTMLParser):
    """Collects the script elements, and everything that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.loads: list[tuple[str, str | None]] = []
        self._inside = False

    def handle_starttag(self, tag, attrs):
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")
        self.loads += [(name, value) for name, value in attrs if name in ("src", "href", "data", "action")]

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def test_page_is_self_contained_and_text_cannot_break_out(tmp_path):
    heads = [activity(layer, head) for layer in (0, 2) for head in (0, 1)]
    save_page(heads, TOKENS, tmp_path / "slots.html", title="</script><b>", first=heads[2])
    parser = Scripts()
    parser.feed((tmp_path / "slots.html").read_text("utf-8"))
    assert len(parser.scripts) == 2
    assert not parser.loads
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "slots.html").read_text("utf-8"))
    data = json.loads(parser.scripts[0])
    assert data["tokens"] == TOKENS
    assert data["title"] == "</script><b>"
    assert [(h["layer"], h["head"]) for h in data["heads"]] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert data["first"] == 2


def test_page_says_what_the_slots_are_ordered_by(tmp_path):
    save_page([activity()], TOKENS, tmp_path / "slots.html", title="")
    page = (tmp_path / "slots.html").read_text("utf-8")
    assert "Half-life: this token's" in page
    assert "ordered by median half-life over the text" in page


def test_page_tables_hold_the_numbers(tmp_path):
    shown = activity()
    save_page([shown], TOKENS, tmp_path / "slots.html", title="")
    parser = Scripts()
    parser.feed((tmp_path / "slots.html").read_text("utf-8"))
    head = json.loads(parser.scripts[0])["heads"][0]
    below = shown.attention[np.tril_indices(len(TOKENS))]
    for name, values in (("read", shown.read), ("write", shown.write), ("keep", shown.keep), ("attention", below)):
        table = head[name]
        fractions = np.frombuffer(base64.b64decode(table["data"]), "<u2") / 65535
        np.testing.assert_allclose(fractions * table["max"], values.ravel(), atol=table["max"] / 65535)


def test_refuses_a_page_no_browser_would_open(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "LARGEST_PAGE", 100)
    with pytest.raises(UsageError, match="Choose a layer"):
        save_page([activity()], TOKENS, tmp_path / "slots.html", title="")
    assert not (tmp_path / "slots.html").exists()
