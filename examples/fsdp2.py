"""Trains under FSDP2 on two processes of this machine, saves a checkpoint, and goes on from it on two and on one.

    pip install ".[examples]"
    python examples/fsdp2.py

Takes 57 seconds of processor time. On GPUs torchrun starts the processes, and init_process_group needs no arguments.
"""
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import opt8bit

BATCH, LENGTH, STEPS = 16, 128, 40


def train(rank: int, ranks: int, folder: str, first: int, last: int) -> None:
    meeting = f"file://{folder}/{ranks}-from-{first}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=2))
    for part in (*model.model.layers, model):
        fully_shard(part)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-3)  # its states are sharded as their parameters are
    if first:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        load(states, checkpoint_id=f"{folder}/2-{first}")
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    for step in range(first + 1, last + 1):
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=torch.Generator().manual_seed(step))
        batch = data[starts + torch.arange(LENGTH)][rank::ranks]  # each process has its share
        (loss := model(input_ids=batch, labels=batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.all_reduce(mean := loss.detach() / ranks)
        if rank == 0 and step == last:
            print(f"{ranks} processes, from step {first} to {last}: loss {mean:.4f}", flush=True)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    save(states, checkpoint_id=f"{folder}/{ranks}-{last}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps: to see that it runs")
    steps = 2 if parser.parse_args().quick else STEPS
    with tempfile.TemporaryDirectory() as folder:
        for ranks, first in ((2, 0), (2, steps), (1, steps)):
            torch.multiprocessing.spawn(train, (ranks, folder, first, first + steps), nprocs=ranks)
