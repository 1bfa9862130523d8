"""What do weights, states, checkpoints and messages take under FSDP2, per parameter of a model and for large ones?

    pip install ".[compress]"
    python benchmarks/sharding.py

A LLaMA of random weights is trained for two steps by ``AdamW8bit`` and by ``torch.optim.AdamW`` on 1, 2 and 4
processes of this machine. Counted are the bytes of the tensors that the process with most of them has, of the files of
a distributed checkpoint, and of what a process receives in a step: of each collective operation, as torch hands it to
the processes' group, what does not come from the process itself. The second table is what ``opt8bit memory --ranks``
tells of large models in bfloat16; the first is to show that it tells the truth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import arguments, write_rows
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import opt8bit
from opt8bit.optim import memory_report

RANKS = (1, 2, 4)
OPTIMIZERS = {"torch.optim.AdamW": torch.optim.AdamW, "opt8bit.AdamW8bit": opt8bit.AdamW8bit}
LARGE = {  # hidden, intermediate, blocks, heads, key-value heads, vocabulary
    "LLaMA-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "LLaMA-2-70B": (8192, 28672, 80, 64, 8, 32000),
    "LLaMA-3.1-405B": (16384, 53248, 126, 128, 8, 128256),
}
LARGE_RANKS = (8, 64, 1024)


def llama(hidden: int, intermediate: int, blocks: int, heads: int, key_value_heads: int, vocabulary: int) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        max_position_embeddings=128,
    )
    return transformers.LlamaForCausalLM(config)


class Received(TorchDispatchMode):
    """Counts what a process receives from others."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            ranks = dist.get_world_size()
            if "allgather_base" in name:
                gathered = args[0]
            elif "reduce_scatter" in name:
                gathered = args[1]
            elif ranks == 1 or "barrier" in name:
                return func(*args, **(kwargs or {}))
            else:
                raise NotImplementedError(f"{name} is not counted")
            self.bytes += gathered.numel() * gathered.element_size() * (ranks - 1) / ranks
        return func(*args, **(kwargs or {}))


def local_bytes(tensors: Any) -> int:
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def work(file: Path, sizes: tuple[int, ...]) -> None:
    """What one process of several does; the first writes what was counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for name, kind in OPTIMIZERS.items():
        torch.manual_seed(0)
        model: nn.Module = llama(*sizes)
        count = sum(param.numel() for param in model.parameters())
        for block in model.model.layers:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(model)
        optimizer = kind(model.parameters(), lr=1e-3)
        ids = torch.randint(sizes[-1], (1, 32), generator=torch.Generator().manual_seed(0))
        steps = [Received(), Received()]  # of which the second is a step like any other
        for received in steps:
            optimizer.zero_grad()
            with received:
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            paths: list[Any] = [folder]
            dist.broadcast_object_list(paths)
            states: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            save(states, checkpoint_id=paths[0])
            written = sum(path.stat().st_size for path in Path(paths[0]).iterdir())
            dist.barrier()
        counted: dict[str, float] = {
            "weight_bytes": local_bytes(model.parameters()),
            "state_bytes": local_bytes(value for state in optimizer.state.values() for value in state.values()),
            "received_bytes": steps[-1].bytes,
        }
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, counted)
        most = {key: max(each[key] for each in found) for key in counted}
        told = None
        if name.startswith("opt8bit"):
            with torch.device("meta"):
                row = memory_report(llama(*sizes), ranks=dist.get_world_size()).rows[0]
            told = {"weight_bytes": row.weight_bytes, "state_bytes": row.state_bytes}
        about = {"optimizer": name, "ranks": dist.get_world_size(), "parameters": count}
        rows.append({**about, **most, "checkpoint_bytes": written, "told": told})
    if dist.get_rank() == 0:
        file.write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # meshes hold on to groups, whose threads may fall over the interpreter's end


def measured(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            file = Path(folder) / f"{ranks}.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            here = [__file__, "--work", str(file), "--sizes", *map(str, sizes)]
            subprocess.run([*command, *here], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            rows += json.loads(file.read_text())
    return rows


def told(large: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    rows = []
    for name, sizes in large.items():
        with torch.device("meta"):
            model = llama(*sizes).to(torch.bfloat16)
        for ranks in LARGE_RANKS:
            row = memory_report(model, ranks=ranks).rows[0]
            sent = 3 * (ranks - 1) / ranks * 2 * sum(param.numel() for param in model.parameters())
            rows.append(
                {
                    "model": name,
                    "ranks": ranks,
                    "weight_bytes": row.weight_bytes,
                    "state_bytes_32": row.state_bytes_32,
                    "state_bytes": row.state_bytes,
                    "received_bytes": sent,
                }
            )
    return rows


def show(measured: list[dict[str, Any]], told: list[dict[str, Any]]) -> None:
    print(f"{'bytes per parameter of the model':<34}{'weights':>9}{'states':>9}{'file':>9}{'received':>10}")
    for row in measured:
        columns = ("weight_bytes", "state_bytes", "checkpoint_bytes", "received_bytes")
        values = [row[column] / row["parameters"] for column in columns]
        print(f"{row['ranks']} ranks, {row['optimizer']:<25}" + "".join(f"{value:9.3f}" for value in values))
        if row["told"]:
            assert row["told"] == {key: row[key] for key in row["told"]}, "opt8bit memory tells something else"
    print(f"\n{'GB on each rank':<28}{'weights':>10}{'32-bit states':>15}{'8-bit states':>14}{'received':>10}")
    for row in told:
        columns = ("weight_bytes", "state_bytes_32", "state_bytes", "received_bytes")
        weights, full, coded, received = (row[column] / 1e9 for column in columns)
        print(f"{row['model']:<16}{row['ranks']:>6} ranks{weights:10.2f}{full:15.2f}{coded:14.2f}{received:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs=6, help=argparse.SUPPRESS)
    options = arguments(parser, "sharding")
    if options.work:
        work(options.work, tuple(options.sizes))
    small = (128, 256, 2, 4, 2, 512) if options.quick else (320, 864, 6, 5, 5, 4096)
    found, large = measured(small), told({name: LARGE[name] for name in list(LARGE)[: 1 if options.quick else None]})
    show(found, large)
    write_rows(options.rows, [*found, *large])
    print(f"\nRows: {options.rows}")


if __name__ == "__main__":
    main()
