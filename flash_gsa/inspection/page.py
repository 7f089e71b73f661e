"""One self-contained HTML page on which the slots of a model can be explored by hovering over its text."""

import base64
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from flash_gsa.errors import UsageError
from flash_gsa.inspection.slots import Array, SlotActivity

LARGEST_PAGE = 64 * 2**20
"""Pages above so many bytes are refused: a browser would hardly open them."""

_PLACE = "/*DATA*/"


def save_page(
    activities: Sequence[SlotActivity],
    tokens: Sequence[str],
    path: Path,
    *,
    title: str,
    first: SlotActivity | None = None,
) -> None:
    """Write the page: the text, the slots of every head in `activities`, all script and style inline.

    The template is `page.html` beside this file. Numbers are stored as 16-bit fractions of each table's
    largest value, so they are exact to 1/65535 of it.

    Args:
        activities: heads of one model on one text.
        tokens: the T tokens' texts.
        path: where to write.
        title: heading, for instance the checkpoint's name.
        first: the head shown when the page opens; by default the first.

    Raises:
        UsageError: the page would be larger than `LARGEST_PAGE`.
    """
    size = sum(2 * 4 * (3 * a.read.size + len(tokens) * (len(tokens) + 1) // 2) // 3 for a in activities)
    if size > LARGEST_PAGE:
        raise UsageError(
            f"the page for {len(activities)} heads and {len(tokens)} tokens would hold {size / 2**20:.0f} MiB; "
            f"at most {LARGEST_PAGE >> 20} are written. Choose a layer, a head or a shorter text"
        )
    data = {
        "title": title,
        "tokens": list(tokens),
        "slots": activities[0].read.shape[1],
        "first": next((i for i, a in enumerate(activities) if a is first), 0),
        "heads": [_pack(a) for a in activities],
    }
    template = files("flash_gsa.inspection").joinpath("page.html").read_text("utf-8")
    before, after = template.split(_PLACE)
    # "<" is the only character with which JSON inside a script element could end that element.
    page = before + json.dumps(data, ensure_ascii=False).replace("<", "\\u003c") + after
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")


def _pack(activity: SlotActivity) -> dict[str, Any]:
    below = np.tril_indices(len(activity.read))
    return {
        "layer": activity.layer,
        "head": activity.head,
        "read": _table(activity.read),
        "write": _table(activity.write),
        "keep": _table(activity.keep),
        "attention": _table(activity.attention[below]),
    }


def _table(values: Array) -> dict[str, Any]:
    """`{"max", "data"}`: little-endian 16-bit fractions of max, row by row, in base64."""
    largest = float(values.max()) or 1.0
    fractions = np.rint(np.clip(values, 0, None) / largest * 65535).astype("<u2")
    return {"max": largest, "data": base64.b64encode(fractions.tobytes()).decode("ascii")}
