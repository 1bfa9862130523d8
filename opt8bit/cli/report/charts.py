"""Charts in SVG. Their colours are in the page's style, which knows whether the screen is dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from opt8bit.cli.report.markup import Html, element, joined

WIDTH, HEIGHT = 300, 120  # of a chart, in the units of its viewBox
LEFT, BOTTOM = 34, 16  # that its axes take of these


def strip(label: str, cells: Sequence[tuple[str, float]]) -> Html:
    """Returns a row of cells that fills the width.

    Args:
        label: of the whole, for who does not see it.
        cells: what each is called, and how dark it is, from 0 to 1.
    """
    parts = [
        element("rect", element("title", title), x=i, y=0, width=1, height=1, fill_opacity=max(shade, 0.05))
        for i, (title, shade) in enumerate(cells)
    ]
    box = f"0 0 {len(cells)} 1"
    return element("svg", *parts, class_="strip", viewBox=box, preserveAspectRatio="none", role="img", aria_label=label)


def histogram(label: str, bins: Sequence[tuple[str, int]], ends: tuple[str, str]) -> Html:
    """Returns bars on an axis.

    Args:
        label: of the whole.
        bins: what each bar is called, and its height.
        ends: what stands under the first and the last bar.
    """
    most, step = max(count for _, count in bins), WIDTH / len(bins)
    floor = HEIGHT - BOTTOM
    bars = []
    for i, (title, count) in enumerate(bins):
        height = floor * count / most
        place = {"x": (i + 0.05) * step, "y": floor - height, "width": 0.9 * step, "height": height}
        bars.append(element("rect", element("title", f"{title}: {count:,}"), class_="bar", **place))
    texts = [
        element("text", ends[0], x=0, y=HEIGHT - 3),
        element("text", ends[1], x=WIDTH, y=HEIGHT - 3, text_anchor="end"),
    ]
    return _chart(label, joined([*bars, *texts]))


def lines(
    label: str, series: Mapping[str, Sequence[float]], titles: Sequence[str], ends: tuple[str, str], powers: range
) -> Html:
    """Returns lines over the same places, on a logarithmic axis.

    Args:
        label: of the whole.
        series: values by the class that styles their line. What is not positive and finite has no point.
        titles: of the places.
        ends: what stands under the first and the last place.
        powers: of ten, that have a line across.
    """
    floor, low, high = HEIGHT - BOTTOM, powers[0], powers[-1]

    def y(value: float) -> float:
        return 8 + (floor - 8) * (high - math.log10(value)) / (high - low)

    def x(place: int) -> float:
        return LEFT + (WIDTH - LEFT - 6) * (place / (len(titles) - 1) if len(titles) > 1 else 0.5)

    parts = []
    for power in powers:
        across = {"x1": LEFT, "x2": WIDTH, "y1": y(10.0**power), "y2": y(10.0**power)}
        parts.append(element("line", class_="grid", **across))
        parts.append(element("text", f"1e{power}", x=LEFT - 4, y=y(10.0**power) + 4, text_anchor="end"))
    for name, values in series.items():
        points = [(x(i), y(value), titles[i]) for i, value in enumerate(values) if is_shown(value)]
        parts.append(element("polyline", class_=name, points=" ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)))
        parts += [element("circle", element("title", title), class_=name, cx=a, cy=b, r=2) for a, b, title in points]
    parts.append(element("text", ends[0], x=LEFT, y=HEIGHT - 3))
    parts.append(element("text", ends[1], x=WIDTH - 6, y=HEIGHT - 3, text_anchor="end"))
    return _chart(label, joined(parts))


def _chart(label: str, content: Html) -> Html:
    return element("svg", content, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def powers_of_ten(values: Sequence[float]) -> tuple[int, int]:
    """Returns exponents between whose powers all values lie that a logarithmic axis can show."""
    shown = [value for value in values if is_shown(value)]
    if not shown:
        return -1, 0
    low = math.floor(math.log10(min(shown)))
    return low, max(math.ceil(math.log10(max(shown))), low + 1)


def is_shown(value: float) -> bool:
    """Tells whether a logarithmic axis can show a value."""
    return 0 < value < math.inf
