"""``opt8bit evaluate``: the perplexity of a language model on a text."""

from __future__ import annotations

from opt8bit.cli.errors import CommandError
from opt8bit.cli.models import load, load_tokenizer
from opt8bit.cli.texts import Text, first_windows, lacks_bos
from opt8bit.ptq import perplexity
from opt8bit.ptq.report import valid_json


def report(
    model: str, text: Text, length: int, samples: int, *, bos: bool, as_json: bool, trust_remote_code: bool
) -> str:
    """Returns the text that ``opt8bit evaluate`` prints.

    Raises:
        CommandError: the model or the text cannot be loaded, the text is too short, or the tokenizer has no token that
            begins a text, which ``bos`` asks for.
    """
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    try:
        ids = first_windows(text, tokenizer, length, samples, bos=bos)
        network = load(model, trust_remote_code=trust_remote_code)  # last, as it takes longest
        value = perplexity(network, ids)
    except ValueError as error:
        raise CommandError(f"{text.name}: {error}") from error
    dtype = str(network.dtype).removeprefix("torch.")
    if as_json:
        windows = {"text": text.name, "sequence_length": length, "samples": samples, "bos": bos}
        return valid_json({"model": model, **windows, "dtype": dtype, "perplexity": value})
    line = f"perplexity {value:.3f} of {model} on {samples} windows of {length} tokens of {text.name}, in {dtype}"
    note = None if bos else lacks_bos(tokenizer)
    return line if note is None else f"{line}\n{note}"
