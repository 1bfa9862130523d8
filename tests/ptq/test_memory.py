"""A model several times larger than what the process may have in memory is compressed, and verified, all the same."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux has it")

LAYERS, WIDTH, INNER = 24, 512, 4096
ALLOWED = 230e6  # beyond what the imports take; the weights are three times as much

MAKE = f"""
    import json, sys, torch, transformers
    from pathlib import Path
    from opt8bit.ptq.export.shards import write_shards
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size={WIDTH}, intermediate_size={INNER}, num_hidden_layers={LAYERS},
        num_attention_heads=8, max_position_embeddings=64, architectures=["LlamaForCausalLM"], dtype="float32",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    folder = Path(sys.argv[1])
    config.save_pretrained(folder)
    torch.manual_seed(0)
    tensors = ((name, torch.randn(p.shape) * 0.02) for name, p in model.named_parameters())
    print(write_shards(tensors, folder, 100_000_000))
"""

COMPRESS = """
    import resource, sys, torch, transformers, safetensors.torch, greenlet
    from transformers import LlamaForCausalLM
    from pathlib import Path
    from opt8bit import ptq
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    folder = Path(sys.argv[1])
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = peak()
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    source = ptq.Checkpoint(folder / "model")
    result = ptq.compress(source, ids, method=ptq.RTN(), held_out=ids[:1], work=folder / "work")
    ptq.export(result, folder / "out", format=sys.argv[2])
    print(peak() - before)
"""

VERIFY = """
    import sys, threading, time, torch, transformers, compressed_tensors, accelerate, greenlet
    from transformers import LlamaForCausalLM
    from opt8bit import ptq
    def anonymous():  # resident, without what is mapped from files, which the system may take back
        status = open("/proc/self/status").read()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])
    def watch():
        while True:
            seen.append(anonymous())
            time.sleep(0.002)
    torch.ones(64, 64) @ torch.ones(64, 64)
    seen = [anonymous()]
    threading.Thread(target=watch, daemon=True).start()
    verification = ptq.verify(sys.argv[1], scratch=sys.argv[2], in_parts=True)
    assert verification.is_right, verification
    print(max(seen) - seen[0])
"""


def run(code: str, *arguments: str) -> int:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["compressed-tensors", "dense"])
def test_peak_memory_is_a_few_blocks(format: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = run(MAKE, str(tmp_path / "model"))
    used = run(COMPRESS, str(tmp_path), format)
    assert used < ALLOWED < weights / 3
    assert run(VERIFY, str(tmp_path / "out"), str(tmp_path)) < ALLOWED
