"""Writes what ``opt8bit --help`` prints: what to type first, and every command under a heading. Needs no torch."""

from __future__ import annotations

SUMMARY = "Trains with optimizer states of 8 bits, and makes trained models smaller."
FIRST_STEPS = {
    "opt8bit info": "see which kernels serve this machine",
    "opt8bit demo": "see both train a small GPT: torch's AdamW and opt8bit's",
    "opt8bit memory MODEL": "see what 8-bit optimizer states would save on your model",
    "opt8bit compress MODEL --calibration TEXT --output DIR": "round a language model's weights to 4 bits",
}
GROUPS = {
    "train": {
        "memory": "print the bytes of weights, gradients and states, at 32 and 8 bits",
        "run": "run a script with opt8bit in place of bitsandbytes' optimizers",
        "demo": "train a small GPT with torch's AdamW and with AdamW8bit",
    },
    "make a trained model smaller": {
        "compress": "round a language model's weights to 2-8 bits, and write them",
        "correct": "add biases that correct a quantized checkpoint or ONNX file",
        "convert": "write a packed checkpoint's codes in another layout",
        "evaluate": "print a model's perplexity on a text, or its scores on tasks",
        "verify": "load a written checkpoint and compare it with what was made",
        "inspect": "list what is inside a checkpoint",
        "report": "write a page on a compressed model: sizes, errors, how to serve it",
    },
    "this installation": {
        "info": "print versions, the processor, and what serves each device",
        "completion": "print a script that completes commands in bash, zsh or fish",
    },
}
COMMANDS = {name: words for group in GROUPS.values() for name, words in group.items()}


def overview() -> str:
    """Returns the summary, the first steps and the commands, one a line."""
    lines = [SUMMARY, "", "first steps:"]
    for command, words in FIRST_STEPS.items():
        lines += [f"  {command}", f"      {words}"]
    for heading, commands in GROUPS.items():
        lines += ["", f"{heading}:", *(f"  {name:<12}{words}" for name, words in commands.items())]
    lines += ["", "opt8bit COMMAND --help prints the options of a command."]
    return "\n".join(lines)
