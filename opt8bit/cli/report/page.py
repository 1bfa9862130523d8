"""The page itself: all sections, in a template, in one file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template

from opt8bit import __version__
from opt8bit.cli.errors import CommandError
from opt8bit.cli.report import sections
from opt8bit.cli.report.codes import chosen, codes
from opt8bit.cli.report.markup import Html, element, joined, section
from opt8bit.cli.report.record import Record, read
from opt8bit.cli.report.serving import serving

TEMPLATE = "page.html"


def run(folder: Path, output: Path) -> None:
    """Writes the page, and says where.

    Raises:
        CommandError: the folder is not one that ``opt8bit compress`` has written, there is something at ``output``, or
            it cannot be written.
    """
    if output.exists() or output.is_symlink():
        raise CommandError(f"{output} exists: give the name of a file that does not")
    if not output.parent.is_dir():
        raise CommandError(f"cannot write {output}: {output.parent} is not a folder")
    text = page(read(folder))
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error
    print(f"{output} written, {len(text.encode()) / 1e3:,.0f} kB")


def page(record: Record) -> str:
    """Returns the page on a compressed model.

    Raises:
        CommandError: a layer of it is damaged.
    """
    model = record.report.about["model"]
    template = Template(files("opt8bit.cli.report").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(f"{model} at {record.report.bits_per_weight:.2f} bits a weight"),
        content=joined(_parts(record)),
        footer=html.escape(f"Compressed by opt8bit {record.report.version}, reported by opt8bit {__version__}."),
    )


def _parts(record: Record) -> Iterator[Html]:
    yield sections.summary(record)
    if record.correction is not None:
        yield element("p", "Figures and errors are from before opt8bit correct added biases.", class_="warning")
    for part in (sections.quality, sections.size, sections.bits, sections.errors, codes, sections.recipe, serving):
        found = part(record)
        if found is not None:
            yield found
    yield sections.every_layer(record)
    missing = [element("li", each) for each in _missing(record)]
    if missing:
        yield section("Not recorded, so not shown", element("ul", *missing))


def _missing(record: Record) -> Iterator[str]:
    """Yields what the page would have if it were known, in sentences."""
    if record.report.held_out is None:
        yield "Perplexity and KL divergence: no text was held out."
    if record.source_bytes is None:
        yield "The size of the source: its tensors are not recorded."
    if not record.run:
        yield "The calibration text, the time and the result of the check: the run recorded none."
    if record.is_dense:
        yield "Codes and scales: a dense checkpoint holds the rounded weights themselves."
    elif not chosen(record):
        yield "Codes and scales: the checkpoint has other names for its layers than the report."
    if record.report.about["recipe"].get("reconstruction"):
        yield "Errors of layers after the reconstruction: those that are shown are from before."
