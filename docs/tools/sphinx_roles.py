"""An extension of griffe: what docstrings write in the way of Sphinx is rendered as in Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([^`]+)`")
LITERAL = re.compile(r"::$", re.MULTILINE)  # what precedes an indented block
DOCTEST = re.compile(r"Example:(?=\s+>>>)")  # that Google's style has in the plural


class SphinxRoles(griffe.Extension):
    """Turns roles, such as ``:class:`Grid```, into links where the site has the object, and into code elsewhere."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Goes through a package when all of it is known."""
        rewrite(pkg)


def rewrite(object: griffe.Object) -> None:
    """Rewrites the docstrings of an object and of all that it has."""
    if isinstance(object, griffe.Attribute):
        object.value = default(object.value)
    if object.docstring is not None:
        text = LITERAL.sub(":", DOCTEST.sub("Examples:", object.docstring.value))
        object.docstring.value = ROLE.sub(lambda role: linked(object, role[1]), text)
    for member in object.members.values():
        if not isinstance(member, griffe.Alias):
            rewrite(member)


def default(value: Any) -> Any:
    """Returns what an attribute is set to: the first argument where ``opt8bit.recipe.options.option`` declares it."""
    declared = isinstance(value, griffe.ExprCall) and str(value.function) == "option"
    return value.arguments[0] if declared else value


def linked(object: griffe.Object, name: str) -> str:
    """Returns a name as a link that may lead nowhere: not every object is on the site."""
    try:
        path = object.resolve(name)
    except griffe.NameResolutionError:
        path = name
    return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'
