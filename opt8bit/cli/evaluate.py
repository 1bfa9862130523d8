"""``opt8bit evaluate``: the perplexity of a language model on a text."""

from __future__ import annotations

from opt8bit.cli.errors import CommandError
from opt8bit.cli.models import load, load_tokenizer
from opt8bit.cli.texts import Text, first_windows
from opt8bit.ptq import perplexity
from opt8bit.ptq.report import valid_json


def report(model: str, text: Text, length: int, samples: int, as_json: bool, trust_remote_code: bool) -> str:
    """The text that ``opt8bit evaluate`` prints.

    Raises:
        CommandError: the model or the text cannot be loaded, or the text is too short.
    """
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    try:
        ids = first_windows(text, tokenizer, length, samples)
        network = load(model, trust_remote_code=trust_remote_code)  # last, as it takes longest
        value = perplexity(network, ids)
    except ValueError as error:
        raise CommandError(f"{text.name}: {error}") from error
    dtype = str(network.dtype).removeprefix("torch.")
    if as_json:
        found = {"model": model, "text": text.name, "sequence_length": length, "samples": samples, "dtype": dtype}
        return valid_json({**found, "perplexity": value})
    return f"perplexity {value:.3f} of {model} on {samples} windows of {length} tokens of {text.name}, in {dtype}"
