"""The programs that run checkpoints, and what each of them runs. Needs no torch.

The rules were read in the source code of the versions named here. A later version may run more. A runtime is a record
in :data:`RUNTIMES`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DENSE = "dense"  # the format that everything reads
PACKED = "compressed-tensors"  # and the one that most of them read codes in
VLLM, SGLANG = "vLLM 0.33.0", "SGLang 0.5.23"
SERVE_VLLM = "vllm serve {quoted}"
LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})"""
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
FLOATS = ("nvfp4", "mxfp4")  # grids of 4-bit floats
MARLIN = (32, 64, 128, None)  # the group sizes of the kernels that both servers have


@dataclass(frozen=True)
class Runs:
    """Says what a runtime runs of a packed format.

    Attributes:
        symmetric: widths in bits of symmetric grids.
        asymmetric: widths in bits of the others.
        group_sizes: None among them stands for whole rows; None in their place for any.
        multiple: that a weight's inputs and outputs have to be of.
        otherwise: what it does with everything else.
        grids: names of :data:`GRIDS` that it runs besides.
    """

    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    group_sizes: tuple[int | None, ...] | None
    multiple: int = 1
    otherwise: str = "does not run"
    grids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Runtime:
    """A program that runs checkpoints.

    Attributes:
        title: its name and version.
        command: that runs a checkpoint, or Python that does: ``{quoted}`` stands for the checkpoint's folder as a shell
            takes it, ``{folder!r}`` as Python does.
        formats: what it runs of each packed format, by the format's name.
        reads_dense: whether it loads the rounded weights in the original's own layout.
        fuses: whether it puts layers such as q, k and v into one matrix, and looks for unpacked routers.
        whole_codes: whether its words hold whole codes only; see :func:`opt8bit.quant.packing.pack`.
        unused_biases: that it loads without a word: types of model, and own names of layers as a regular expression.
        refused_biases: that come with others for which it refuses a checkpoint, in the same way.
    """

    title: str
    command: str
    formats: Mapping[str, Runs]
    reads_dense: bool = True
    fuses: bool = False
    whole_codes: bool = False
    unused_biases: tuple[tuple[str, str], ...] = ()
    refused_biases: tuple[tuple[str, str], ...] = ()


_GPTQ = Runs((4, 8), (), MARLIN, otherwise="refuses")
_UNUSED_BY_VLLM = (("gemma", r".*"), ("cohere", r".*"), ("qwen3", r"o_proj"))
RUNTIMES: Mapping[str, Runtime] = {
    "vllm": Runtime(
        f"{VLLM} on NVIDIA GPUs",
        SERVE_VLLM,
        # Other widths and group sizes than Marlin's are run by Humming.
        {PACKED: Runs(WIDTHS, WIDTHS, (16, *MARLIN), grids=FLOATS), "gptq": _GPTQ},
        fuses=True,
        unused_biases=_UNUSED_BY_VLLM,
    ),
    "vllm-cpu": Runtime(
        f"{VLLM} on CPUs",
        SERVE_VLLM,
        {PACKED: Runs((4,), (4,), (16, *MARLIN), multiple=32)},
        fuses=True,
        unused_biases=_UNUSED_BY_VLLM,
    ),
    "sglang": Runtime(
        SGLANG,
        "python -m sglang.launch_server --model-path {quoted}",
        {PACKED: Runs((4, 8), (4,), MARLIN, multiple=64, grids=("nvfp4",))},
        fuses=True,
        unused_biases=(
            ("gemma", r".*"),
            ("cohere", r".*"),
            ("granite", r".*"),
            ("llama", r"gate_proj|up_proj|down_proj"),
        ),
    ),
    "transformers": Runtime(
        "transformers 5 with compressed-tensors 0.18 or later",
        LOAD,
        {PACKED: Runs(WIDTHS, WIDTHS, None, grids=FLOATS)},
    ),
    "mlx": Runtime(
        "mlx-lm 0.32.2",
        "mlx_lm.generate --model {quoted} --prompt 'Once upon a time'",
        {"mlx": Runs((2, 3, 4, 5, 6, 8), (), (32, 64, 128), otherwise="refuses")},
    ),
    "llama.cpp": Runtime(
        "llama.cpp, as in xllamacpp 2026.10",
        "llama-cli --model {quoted}/model.gguf --prompt 'Once upon a time'",
        {"gguf": Runs((4, 5, 8), (), (32,))},
        reads_dense=False,
        # It adds biases to their queries, keys and values; in transformers those come with one of the output.
        refused_biases=(("qwen3", r".*"), ("gemma3_text", r".*")),
    ),
    "compressed-tensors-0.17": Runtime(
        "transformers with compressed-tensors 0.17",
        LOAD,
        # By multiples of 32 the number of words says how they are packed.
        {PACKED: Runs(WIDTHS, WIDTHS, None, multiple=32, grids=FLOATS)},
        whole_codes=True,
    ),
}
# What is warned of where no runtime is named: of vLLM what its kernels for all machines lack.
SERVERS = (
    Runtime(
        VLLM,
        SERVE_VLLM,
        {
            PACKED: Runs(
                (4, 8),
                (4,),
                MARLIN,
                otherwise="runs on NVIDIA GPUs only, if at all (Humming kernels):",
                grids=FLOATS,
            ),
            "gptq": _GPTQ,
        },
        fuses=True,
        unused_biases=_UNUSED_BY_VLLM,
    ),
    RUNTIMES["sglang"],
)


def runtime_of(name: str | None) -> Runtime | None:
    """Returns a runtime by its name, or None for none.

    Raises:
        ValueError: nothing has that name.
    """
    if name is None:
        return None
    if name not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {name!r}")
    return RUNTIMES[name]


def packed_format(name: str | None) -> str:
    """Returns the format in which a runtime reads codes, the first where there are several.

    Args:
        name: of the runtime; None for any.

    Raises:
        ValueError: nothing has that name.
    """
    runtime = runtime_of(name)
    return PACKED if runtime is None else next(iter(runtime.formats))


def check_reads(name: str | None, format: str) -> None:
    """Checks that a runtime reads a format of checkpoints.

    Raises:
        ValueError: it does not, or nothing has its name.
    """
    runtime = runtime_of(name)
    if runtime is None or format in (allowed := (*runtime.formats, DENSE)):
        return
    raise ValueError(f"runtime {name!r}, {runtime.title}, reads the formats {' and '.join(allowed)}, got {format!r}")
