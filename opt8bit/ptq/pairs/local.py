"""Errors of modules that see what their counterparts in the float model see, from passes of that alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.model.running import Running
from opt8bit.ptq.pairs.batches import call, mask_of
from opt8bit.ptq.pairs.layer_error import LayerError, Mismatch


def local_errors(reference: Running, errors: Sequence[LayerError], batches: Sequence[Any]) -> dict[str, str]:
    """Runs the float model over all batches; each module's counterpart sees what the module sees.

    Args:
        reference: the float model.
        errors: of its modules; they get what there is to see.
        batches: of the calibration.

    Returns:
        Modules that turn out not to match, with the reason.

    Raises:
        ValueError: an output is not finite, or no tensor.
    """
    unmatched: dict[str, str] = {}
    masks = [mask_of(batch) for batch in batches]
    mask: list[Tensor | None] = [None]  # of the batch that goes on now

    def turn(i: int) -> None:
        mask[0] = masks[i]

    def watching(error: LayerError) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if error.pair.name in unmatched:
                return
            with about(error):
                try:
                    error.see(args, kwargs, output, mask[0])
                except Mismatch as mismatch:
                    unmatched[error.pair.name] = str(mismatch)

        return see

    handles = [e.pair.reference.register_forward_hook(watching(e), with_kwargs=True) for e in errors]
    try:
        for _ in reference.outputs([partial(call, batch=batch) for batch in batches], turn):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return unmatched


@contextmanager
def about(error: LayerError) -> Iterator[None]:
    """Adds the name of the module to errors about arguments, inside the context."""
    try:
        yield
    except Mismatch:
        raise
    except (ValueError, TypeError) as reason:
        if str(reason).startswith(error.pair.title):
            raise
        raise type(reason)(f"{error.pair.title}: {reason}") from reason
