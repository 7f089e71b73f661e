"""A picture of what one head does with its slots on a text, as PNG."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from flash_gsa.inspection.slots import SlotActivity

# Sizes in inches. They are laid out by hand, because letting matplotlib measure hundreds of labels takes seconds.
_TOKEN, _WIDEST, _NARROWEST = 0.125, 45.0, 7.0
_SLOT, _HIGHEST, _LOWEST = 0.085, 6.5, 2.0
_LEFT, _RIGHT, _TOP, _BETWEEN, _BAR = 0.55, 1.0, 0.65, 0.4, 0.15
_CHARACTER = 0.065

_LABEL_CHARACTERS = 14
_SLOT_NUMBERS = 32


def save_picture(activity: SlotActivity, tokens: Sequence[str], path: Path, *, title: str = "") -> None:
    """Draw reading, writing and forgetting as three panels of slots × tokens, and save them.

    Slots stand in order of memory, the longest (by median half-life) on top; the numbers at the axis are the
    slots' own. Tokens run along the x axis with their text: "␣" is a space, "␣×8" eight, "⏎" a new line, "·"
    a token that ends within a character.

    Args:
        activity: T tokens, M slots.
        tokens: the T tokens' texts.
        path: where to write; the suffix chooses the format (".png", ".pdf", ".svg").
        title: a line above the picture.
    """
    T, M = activity.read.shape
    half_life = np.clip(activity.half_life, 0.1, 1e5)
    order = np.argsort(-np.median(half_life, axis=0), kind="stable")
    panels = (
        ("read: how the head spreads its attention over slots", activity.read, Normalize(0), "viridis", "share"),
        ("write: how strongly the token enters each slot", activity.write, Normalize(0), "magma", "strength s"),
        ("forget: half-life of a slot at this token's gate", half_life, LogNorm(), "cividis", "tokens"),
    )
    labels = [_label(token) for token in tokens]
    width = min(max(_TOKEN * T, _NARROWEST), _WIDEST)
    height = min(max(_SLOT * M, _LOWEST), _HIGHEST)
    bottom = _CHARACTER * max(map(len, labels)) + 0.5
    whole = (_LEFT + width + _RIGHT, _TOP + 3 * height + 2 * _BETWEEN + bottom)

    figure = Figure(figsize=whole, dpi=130)
    for i, (name, values, norm, colours, unit) in enumerate(panels):
        low = bottom + (2 - i) * (height + _BETWEEN)
        axis = _axes(figure, _LEFT, low, width, height)
        image = axis.imshow(values.T[order], norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
        axis.set_title(name, loc="left", fontsize=10)
        _number_slots(axis, order)
        bar = figure.colorbar(image, cax=_axes(figure, _LEFT + width + 0.12, low, _BAR, height))
        if isinstance(norm, LogNorm):
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            bar.ax.yaxis.set_major_formatter("{x:g}")
            bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.set_label(unit, fontsize=9)
        bar.ax.tick_params(labelsize=8)
    _name_tokens(axis, labels)
    heading = f"layer {activity.layer}, head {activity.head}"
    if title:
        heading = f"{title}: {heading}"
    figure.text(_LEFT / whole[0], 1 - 0.2 / whole[1], heading, fontsize=12, va="center", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Scripts that the font lacks are drawn as boxes; the page shows them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    across, up = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    axes.set_xticks([])
    return axes


def _number_slots(axis: Axes, order: np.ndarray) -> None:
    at = np.arange(0, len(order), -(-len(order) // _SLOT_NUMBERS))
    axis.set_yticks(at, [str(slot) for slot in order[at]], fontsize=6)
    axis.tick_params(length=2)
    axis.set_ylabel("slot, longest memory on top", fontsize=9)


def _name_tokens(axis: Axes, labels: list[str]) -> None:
    upright = max(map(len, labels)) <= 1
    axis.set_xticks(
        range(len(labels)),
        labels,
        rotation=0 if upright else 90,
        fontsize=8,
        fontfamily="DejaVu Sans Mono",  # comes with matplotlib
        parse_math=False,
    )
    axis.set_xlabel("token", fontsize=9)


def _label(token: str) -> str:
    """A token's text as a tick label: white space made visible, long texts cut, "·" if it has no text of its own."""
    shown = token.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "·"
    shown = "".join(c if c.isprintable() else "·" for c in shown)
    shown = re.sub("␣{3,}", lambda spaces: f"␣×{len(spaces[0])}", shown)
    return shown if len(shown) <= _LABEL_CHARACTERS else shown[: _LABEL_CHARACTERS - 1] + "…"
