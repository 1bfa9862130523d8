"""HTML, piece by piece. Text is escaped on its way into an element, so that no name can break a page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Marks text that is HTML already."""


def element(tag: str, *content: str, **attributes: str | float) -> Html:
    """Returns an element. ``class_`` stands for the attribute class, and ``aria_label`` for aria-label."""
    inside = "".join(part if isinstance(part, Html) else html.escape(part) for part in content)
    said = "".join(f' {name.strip("_").replace("_", "-")}="{_value(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{said}>{inside}</{tag}>")


def _value(value: str | float) -> str:
    return html.escape(value) if isinstance(value, str) else f"{value:.6g}"


def joined(parts: Iterable[Html]) -> Html:
    """Returns elements one after another."""
    return Html("\n".join(parts))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Returns a table that scrolls by itself where the screen is narrower."""
    head = element("tr", *(element("th", heading) for heading in headings))
    body = joined(element("tr", *(element("td", cell) for cell in row)) for row in rows)
    return element("div", element("table", element("thead", head), element("tbody", body)), class_="scrolls")


def section(title: str, *content: Html) -> Html:
    """Returns a part of the page under a heading."""
    return element("section", element("h2", title), *content)
