"""Makes the links of README lead to a release on GitHub: PyPI shows README without the files that it links to.

    python docs/tools/absolute_links.py https://github.com/OWNER/opt8bit v1.2.3 README.md

The release workflow does this before it builds. README itself keeps links that work in a clone and on GitHub.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"(?P<image>!?)(?P<text>\[[^\]]*\]\()(?![a-z]+:|#)(?P<target>[^)\s]+)")


def absolute(markdown: str, repository: str, tag: str) -> str:
    """Returns a text whose relative links lead to a tag of a repository, those of pictures to their bytes."""

    def moved(link: re.Match[str]) -> str:
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}{link['text']}{repository}/{kind}/{tag}/{link['target']}"

    return LINK.sub(moved, markdown)


def main(repository: str, tag: str, *files: str) -> None:
    for file in map(Path, files):
        file.write_text(absolute(file.read_text(encoding="utf-8"), repository, tag), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
