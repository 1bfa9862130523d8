"""``opt8bit convert``: a packed checkpoint in, the same codes and scales in another layout out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opt8bit import ptq
from opt8bit.cli.errors import CommandError
from opt8bit.cli.models import open_unpacked


def run(model: str, output: Path, format: str, *, round_again: bool, trust_remote_code: bool) -> None:
    """Converts, and says what was done.

    Raises:
        CommandError: something the user can mend; nothing has been written.
    """
    if output.exists() or output.is_symlink():  # known before a model is downloaded
        raise CommandError(f"{output} exists: give the name of a folder that does not")
    source = open_unpacked(model, trust_remote_code=trust_remote_code)
    name = None if Path(model).expanduser().is_dir() else model
    try:
        done = ptq.convert(source, output, format=format, round_again=round_again, name=name)
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error
    print("\n".join(_lines(done)))


def _lines(done: ptq.Conversion) -> Iterator[str]:
    for before, after in done.group_sizes:
        yield f"groups of {before} are cut into groups of {after}, each with the scale of the whole"
    for name, error in done.errors.items():
        yield f"rounded again: {name}: squared error {error:.2e} of the square of the weight before"
    for name, why in done.again.items():
        yield f"why: {name or 'outside of the blocks'}: {why}"
    kept = "values" if done.format == "dense" else "codes and scales"
    others = " of the others" if done.errors else ""
    said = f"{done.layers} layers; {kept}{others} are those of the source"
    yield f"{done.path} written in the format {done.format}: {said}"
