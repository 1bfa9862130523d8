"""Checkpoints of transformers 4's days, compressed: the original and the output load alike in two versions.

Skipped unless ``OPT8BIT_OTHER_PYTHON`` is the path of a Python with another major version of transformers::

    python -m venv other && other/bin/pip install ".[transformers4]"
    OPT8BIT_OTHER_PYTHON=other/bin/python pytest tests/frameworks/test_transformers_versions.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

OTHER = os.environ.get("OPT8BIT_OTHER_PYTHON", "")
PLAIN = Path(__file__).with_name("plain_transformers.py")
pytestmark = [
    pytest.mark.skipif(not OTHER, reason="needs OPT8BIT_OTHER_PYTHON, a Python with another version of transformers"),
    pytest.mark.filterwarnings("ignore"),  # what loading warns of is transformers'
]
TEXT = "the model is rounded to eight bits: weights of a language change, outputs (least of all) are 0.5 off"
# Weights rounded to 8 bits are off by half a percent of their spread; two blocks add up to less than this.
ROUNDING = 0.05
EXACT = 1e-3  # sums in another order, in float32

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "transformers_version": "4.44.0",
}
GEMMA: dict[str, Any] = {
    **SIZES,
    **{"tie_word_embeddings": True, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
    **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
}
GEMMA3: dict[str, Any] = {
    **GEMMA,
    **{"rope_theta": 100.0, "rope_local_base_freq": 20.0, "rope_scaling": {"factor": 4.0, "rope_type": "linear"}},
    **{"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8, "model_type": "gemma3_text"},
}
VISION = {
    **{"model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False},
}
LLAMA3 = {
    **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 32, "rope_type": "llama3"},
}


class Family(NamedTuple):
    """A kind of checkpoint: its tokenizer, the class of its model, and its configuration in transformers 4's words."""

    tokenizer: str
    architecture: str
    config: dict[str, Any]


# The bases of rotary embeddings are such that 24 tokens tell them from the defaults.
FAMILIES = {
    "llama-llama3": Family(
        "llama", "LlamaForCausalLM", {**SIZES, "model_type": "llama", "rope_theta": 50.0, "rope_scaling": LLAMA3}
    ),
    "llama-linear": Family(
        "llama",
        "LlamaForCausalLM",
        {**SIZES, "model_type": "llama", "rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        {
            **{**SIZES, "model_type": "qwen2", "rope_theta": 50.0},
            **{"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        },
    ),
    "qwen3": Family("qwen2", "Qwen3ForCausalLM", {**SIZES, "model_type": "qwen3", "rope_theta": 50.0, "head_dim": 8}),
    "mistral": Family(
        "llama", "MistralForCausalLM", {**SIZES, "model_type": "mistral", "rope_theta": 50.0, "sliding_window": 8}
    ),
    "mistral-full": Family(
        "llama", "MistralForCausalLM", {**SIZES, "model_type": "mistral", "rope_theta": 50.0, "sliding_window": None}
    ),
    "gemma": Family("gemma", "GemmaForCausalLM", {**GEMMA, "model_type": "gemma", "rope_theta": 50.0}),
    "gemma2": Family(
        "gemma",
        "Gemma2ForCausalLM",
        {
            **{**GEMMA, "model_type": "gemma2", "rope_theta": 50.0, "sliding_window": 8, "query_pre_attn_scalar": 8},
            # So high that it changes nothing: the attention that 4.57 takes by default leaves it out.
            **{"attn_logit_softcapping": 1e4, "final_logit_softcapping": 30.0},
        },
    ),
    "gemma3-text": Family("gemma", "Gemma3ForCausalLM", GEMMA3),
    "gemma3": Family(
        "gemma",
        "Gemma3ForConditionalGeneration",
        {
            **{"model_type": "gemma3", "text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4},
            **{"torch_dtype": "float32", "transformers_version": "4.50.0", "image_token_index": 319},
        },
    ),
}
OUTPUTS = {
    "dense": ("--format", "dense"),
    "dense-corrected": ("--format", "dense", "--bias-correction", "sequential"),
    "packed": ("--format", "compressed-tensors"),
    "packed-corrected": ("--format", "compressed-tensors", "--bias-correction", "sequential"),
}


def plain(python: str, *arguments: str) -> str:
    """Runs the script beside this file by a Python, and returns what it prints."""
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [python, str(PLAIN), *arguments]
    return subprocess.run(command, check=True, env=quiet, stdout=subprocess.PIPE, text=True).stdout.strip()


def make(python: str, path: Path) -> None:
    """Writes small random checkpoints as a Python of transformers 4 saves them, with ``config.json`` in its words."""
    originals = []
    for name, family in FAMILIES.items():
        tokenizer = path / "tokenizers" / family.tokenizer
        if not tokenizer.exists():
            tokenizer.mkdir(parents=True)
            plain(python, "tokenizer", family.tokenizer, str(tokenizer))
        original = Path(shutil.copytree(tokenizer, path / name / "original"))
        config = {"architectures": [family.architecture], **family.config}
        (original / "config.json").write_text(json.dumps(config, indent=2))
        originals.append(str(original))
    plain(python, "weights", *originals)


def compress(folder: Path, output: Path, *arguments: str) -> None:
    from opt8bit.cli.main import main

    text = folder.with_name("text.txt")
    text.write_text((TEXT + "\n") * 40)
    sizes = ["--bits", "8", "--group-size", "16", "--samples", "8", "--sequence-length", "24"]
    assert main(["compress", str(folder), "--calibration", str(text), "--output", str(output), *sizes, *arguments]) == 0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """What each version makes of each original and output: by version, by the name of the folder."""
    path = tmp_path_factory.mktemp("versions")
    pythons = {plain(python, "version"): python for python in (sys.executable, OTHER)}
    assert {version.partition(".")[0] for version in pythons} == {"4", "5"}
    (four,) = (python for version, python in pythons.items() if version.startswith("4."))
    make(four, path)
    for name in FAMILIES:
        for output, arguments in OUTPUTS.items():
            compress(path / name / "original", path / name / output, *arguments)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for version, python in pythons.items():
        plain(python, "load", TEXT, str(path / version), str(path))
        found[version] = torch.load(path / version, weights_only=True)
    return found


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far logits are apart, in units of their own spread."""
    return float((found - expected).norm() / (expected - expected.mean()).norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_is_the_same_in_both_versions(name: str, loaded: Any) -> None:
    one, other = (results[f"{name}/original"] for results in loaded.values())
    assert one["ids"] == other["ids"] and len(set(one["ids"])) > 16
    assert not one["wrong"] and not other["wrong"]
    assert distance(one["logits"], other["logits"]) < EXACT


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_is_the_original_rounded_in_both_versions(name: str, output: str, loaded: Any) -> None:
    for version, results in loaded.items():
        original, compressed = results[f"{name}/original"], results[f"{name}/{output}"]
        assert compressed["ids"] == original["ids"], version
        assert not compressed["wrong"], version
        assert 0 < distance(compressed["logits"], original["logits"]) < ROUNDING, version
