"""A hook of mkdocs: what pages link to outside of docs/ is put on the site, so that links work as in the repository.

It is under ``repository/``. Markdown and source code become pages; all other files are copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig  # pyright: ignore[reportMissingImports]
from mkdocs.structure.files import File, Files, InclusionLevel  # pyright: ignore[reportMissingImports]
from mkdocs.structure.pages import Page  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[2]
DOCS, OUTSIDE = "docs/", "repository/"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)#\s]+")  # without the anchor
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".sh": "bash"}
CODE = "---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{text}\n````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds each file outside of docs/ that a page leads to, and what that leads to."""
    todo = [DOCS + file.src_uri for file in files.documentation_pages()]
    known: set[str] = set()
    while todo:
        path = todo.pop()
        for target in {resolved(path, link) for link in LINK.findall((ROOT / path).read_text())} - known:
            if not target.startswith(DOCS) and (ROOT / target).is_file():
                known.add(target)
                files.append(added(target, config))
                todo += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Has the links of a page lead to those files."""
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
    return f"{OUTSIDE}{path}.md" if Path(path).suffix in LANGUAGES else OUTSIDE + path


def added(path: str, config: MkDocsConfig) -> File:
    """Returns a file outside of docs/ as a file of the site."""
    language, file = LANGUAGES.get(Path(path).suffix), ROOT / path
    source: dict[str, str] = {"abs_src_path": str(file)}
    if language is not None:
        source = {"content": CODE.format(path=path, language=language, text=file.read_text())}
    return File.generated(config, place_of(path), inclusion=InclusionLevel.NOT_IN_NAV, **source)
