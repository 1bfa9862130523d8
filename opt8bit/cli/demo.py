"""``opt8bit demo``: one small GPT on real text, trained with 32-bit and with 8-bit optimizer states."""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt8bit.cli.demo_settings import DemoSettings
from opt8bit.cli.errors import CommandError
from opt8bit.cli.progress import ShowStep, training
from opt8bit.nn import StableEmbedding
from opt8bit.optim import AdamW8bit
from opt8bit.optim.table import aligned

MAX_TEXT = 20_000_000  # bytes of text read at most


@dataclass
class Run:
    """Holds what one training run left behind."""

    name: str
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss in nats per byte)
    state_bytes: int = 0
    step_seconds: float = 0.0

    @property
    def final_loss(self) -> float:
        """The validation loss after the last step: where the curve ends, and what the table shows."""
        return self.losses[-1][1]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (batch, context, width)
        batch, context, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, context, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A byte-level GPT."""

    def __init__(self, settings: DemoSettings) -> None:
        super().__init__()
        self.tokens = StableEmbedding(256, settings.width)
        self.positions = nn.Parameter(torch.randn(settings.context, settings.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(settings.width, settings.heads) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, context) -> (batch, context, 256)
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def standard_library_text() -> bytes:
    """Returns the source of the standard library's modules, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if not text:
        raise CommandError(f"no Python source in {folder}; name a text with --text FILE")
    return text[:MAX_TEXT]


def load_text(path: Path | None) -> bytes:
    if path is None:
        return standard_library_text()
    try:
        with path.open("rb") as file:
            return file.read(MAX_TEXT)
    except OSError as error:
        raise CommandError(f"cannot read --text {path}: {error.strerror}") from error


def split(text: bytes, settings: DemoSettings) -> tuple[Tensor, Tensor]:
    """Splits a text into training text and the last tenth, for validation."""
    least = 20 * (settings.context + 1)
    if len(text) < least:
        raise CommandError(f"the text must have at least {least} bytes, got {len(text)}")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batch_loss(model: nn.Module, data: Tensor, settings: DemoSettings, generator: torch.Generator) -> Tensor:
    """Returns the mean cross-entropy, in nats per byte, on a random batch."""
    starts = torch.randint(len(data) - settings.context, (settings.batch, 1), generator=generator)
    window = data[starts + torch.arange(settings.context + 1)]
    logits = model(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, data: Tensor, settings: DemoSettings) -> float:
    generator = torch.Generator().manual_seed(settings.seed)
    losses = [batch_loss(model, data, settings, generator).item() for _ in range(settings.eval_batches)]
    return statistics.fmean(losses)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def train(
    name: str,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    train_data: Tensor,
    valid_data: Tensor,
    settings: DemoSettings,
    show: ShowStep,
) -> Run:
    """Trains a GPT from the settings' seed; only the optimizer differs between two runs."""
    torch.manual_seed(settings.seed)
    model = GPT(settings)
    optimizer = make_optimizer(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.lr,
        total_steps=settings.steps + 1,
        pct_start=min(0.5, settings.warmup / (settings.steps + 1)),
        cycle_momentum=False,
    )
    generator = torch.Generator().manual_seed(settings.seed)
    run, seconds = Run(name), []
    for step in range(1, settings.steps + 1):
        loss = batch_loss(model, train_data, settings, generator)
        optimizer.zero_grad()
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        schedule.step()
        measured = None
        if step % settings.eval_every == 0 or step == settings.steps:
            measured = validation_loss(model, valid_data, settings)
            run.losses.append((step, measured))
        show(step, loss.item(), measured)
    run.state_bytes = state_bytes(optimizer)
    run.step_seconds = statistics.median(seconds)
    return run


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.AdamW": lambda params, **hyper: torch.optim.AdamW(params, fused=True, **hyper),
    "opt8bit.AdamW8bit": AdamW8bit,
}


def run(settings: DemoSettings, text: Path | None, plot: Path) -> list[Run]:
    """Trains with each optimizer, shows progress, prints the table and saves the plot.

    Raises:
        CommandError: the text cannot be read or is too short, a package of the extra ``demo`` is missing, or the
            plot cannot be written.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise CommandError(f"{error.name} is missing: pip install 'opt8bit[demo]'") from error
    if not plot.parent.is_dir():
        raise CommandError(f"cannot write --plot {plot}: {plot.parent} is not a folder")
    formats = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix and plot.suffix[1:].lower() not in formats:
        raise CommandError(f"cannot write --plot {plot}: its ending must be one of {', '.join(sorted(formats))}")
    train_data, valid_data = split(load_text(text), settings)
    size = sum(parameter.numel() for parameter in GPT(settings).parameters())
    print(
        f"A GPT of {size / 1e6:.1f}M parameters learns {'the standard library' if text is None else text} "
        f"({len(train_data) / 1e6:.1f} MB, byte by byte), twice from the same seed: {settings.steps} steps of "
        f"{settings.batch} x {settings.context} bytes on {torch.get_num_threads()} threads.",
        flush=True,  # before what stderr gets
    )
    runs = []
    for name, make_optimizer in OPTIMIZERS.items():
        with training(name, settings.steps) as show:
            runs.append(train(name, make_optimizer, train_data, valid_data, settings, show))
    print(f"\nSame model, same data, same hyper-parameters:\n\n{table(runs)}\n")
    save_plot(runs, plot)
    print(f"Loss curves: {plot}")
    return runs


def table(runs: list[Run]) -> str:
    """Returns the comparison; the last row holds the ratios to the first run."""
    base, ours = runs[0], runs[-1]
    rows = [
        [run.name, f"{run.final_loss:.4f}", f"{run.state_bytes / 1e6:.2f} MB", f"{run.step_seconds * 1e3:.2f} ms"]
        for run in runs
    ]
    ratios = (
        f"{ours.final_loss / base.final_loss:.4f}",
        f"{ours.state_bytes / base.state_bytes:.3f}",
        f"{ours.step_seconds / base.step_seconds:.2f}",
    )
    return aligned(["optimizer", "validation loss", "state", "optimizer step"], [*rows, ["ratio", *ratios]])


def draw(runs: list[Run]) -> Any:
    """Draws both loss curves in one figure of matplotlib's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for run, style in zip(runs, ("-", "--"), strict=True):
        axes.plot(
            *zip(*run.losses, strict=True),
            style,
            marker=".",  # a run of few steps has a single point
            label=f"{run.name}: {run.final_loss:.4f} in the end, {run.state_bytes / 1e6:.2f} MB of state",
        )
    axes.set(xlabel="step", ylabel="validation loss (nats per byte)", title="32-bit and 8-bit optimizer states")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save_plot(runs: list[Run], path: Path) -> None:
    """
    Raises:
        CommandError: the picture cannot be written.
    """
    try:
        draw(runs).savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write --plot {path}: {error}") from error
