"""Models of text and images: the text model's layers are compressed, and all the rest stays, under its own names."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from toys import GATED, VOCABULARY, token_ids

from opt8bit import ptq
from opt8bit.ptq.model.blocks import find_blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weights are in no nn.Linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:not every server runs:UserWarning"),
    pytest.mark.filterwarnings("ignore:layers that stay as they are:UserWarning"),
]
# With more and larger blocks than the text model's: it is told apart all the same.
IMAGES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
QWEN_IMAGES = {**IMAGES, "depth": 3, "num_heads": 4, "in_channels": 3, "num_position_embeddings": 16}
ROTARY = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
END = VOCABULARY - 1


def gemma3(transformers: Any) -> Any:
    text = {**GATED, "head_dim": 8, "sliding_window": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=IMAGES, image_token_index=END)
    return transformers.Gemma3ForConditionalGeneration(config)


def llava(transformers: Any) -> Any:
    text, images = transformers.LlamaConfig(**GATED), transformers.CLIPVisionConfig(**IMAGES)
    config = transformers.LlavaConfig(text_config=text, vision_config=images, image_token_index=END)
    return transformers.LlavaForConditionalGeneration(config)


def qwen3_vl(transformers: Any) -> Any:
    text = {**GATED, "head_dim": 8, "rope_parameters": ROTARY, "rope_scaling": ROTARY}
    images = {**QWEN_IMAGES, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=images, image_token_id=END)
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen3_5(transformers: Any) -> Any:
    if not hasattr(transformers, "Qwen3_5Config"):
        pytest.skip("transformers does not know Qwen 3.5")
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    kinds = {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    images = {**QWEN_IMAGES, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config={**GATED, **linear, **kinds}, vision_config=images)
    return transformers.Qwen3_5ForConditionalGeneration(config)


@pytest.fixture(params=[gemma3, llava, qwen3_vl, qwen3_5], ids=lambda make: make.__name__)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make: Callable[[Any], Any] = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        make(transformers).eval().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("format", ["dense", "compressed-tensors"])
def test_the_rest_of_the_model_stays(format: str, saved: Path, tmp_path: Path) -> None:
    source = ptq.Checkpoint(saved)
    prefix, blocks = find_blocks(source.model)
    assert len(blocks) == 2 and "vis" not in prefix
    result = ptq.compress(source, token_ids() % 90, bits=8, group_size=16, symmetric=True, checkpoint_format=format)
    path = ptq.export(result, tmp_path / "out", format=format)
    had, found = (load_file(folder / "model.safetensors") for folder in (saved, path))
    changed = {source.stored_name(name) for name in result.changes}
    assert changed and had.keys() - found.keys() <= (changed if format != "dense" else set())
    unchanged = {name: value for name, value in had.items() if name not in changed}
    assert all(found[name].equal(value) and found[name].dtype == value.dtype for name, value in unchanged.items())
    config, written = (json.loads((folder / "config.json").read_text()) for folder in (saved, path))
    if format != "dense":
        ignored = written.pop("quantization_config")["ignore"]
        matrices = {name for name, value in unchanged.items() if value.dim() == 2 and name.endswith(".weight")}
        visual = {name.removesuffix(".weight") for name in matrices if "vis" in name and "embed" not in name}
        exact = {name for name in ignored if not name.startswith("re:")}
        patterns = [re.compile(name[3:]) for name in ignored if name.startswith("re:")]
        assert visual and all(any(of.match(name) for of in patterns) for name in visual - exact)
        assert not any(of.match(f"{row.name}") for row in result.report for of in patterns)
    assert written == config
    assert ptq.verify(path).is_right
