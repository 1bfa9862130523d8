"""A hook of mkdocs: what pages link to outside of docs/ becomes a page, so that links work here as in the repository.

The pages are under ``repository/``. Markdown is rendered as it is, everything else as code.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS, OUTSIDE = "docs/", "repository/"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)#\s]+")  # without the anchor
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".sh": "bash"}
CODE = "---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{text}\n````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file outside of docs/ that a page leads to, and so on from there."""
    todo = [DOCS + file.src_uri for file in files.documentation_pages()]
    known = {*todo, *(DOCS + file.src_uri for file in files)}
    while todo:
        path = todo.pop()
        for target in {resolved(path, link) for link in LINK.findall((ROOT / path).read_text())} - known:
            if not target.startswith(DOCS) and (ROOT / target).is_file():
                known.add(target)
                files.append(page_of(target, config))
                todo += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Has the links of a page lead to those pages."""
    here = page.file.src_uri
    path = here.removeprefix(OUTSIDE) if here.startswith(OUTSIDE) else DOCS + here

    def moved(link: re.Match[str]) -> str:
        target = resolved(path, link[0])
        if not (ROOT / target).is_file():
            return link[0]
        return posixpath.relpath(place_of(target), posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)


def resolved(path: str, link: str) -> str:
    """Returns the path in the repository that a link of a file leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def place_of(path: str) -> str:
    """Returns where a file of the repository is among the sources of the site."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return OUTSIDE + path if path.endswith(".md") else f"{OUTSIDE}{path}.md"


def page_of(path: str, config: MkDocsConfig) -> File:
    """Returns the page of a file outside of docs/."""
    text = (ROOT / path).read_text()
    if not path.endswith(".md"):
        text = CODE.format(path=path, language=LANGUAGES[Path(path).suffix], text=text)
    return File.generated(config, place_of(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
