"""Rounds the weights of a small convolutional network to 3 bits, and corrects its outputs by Bias Compensation.

    pip install ".[examples]"
    python examples/vision.py

Takes a few seconds. The images are scikit-learn's 1,797 handwritten digits. Weights are rounded, activations are
not.
"""

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

import opt8bit


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch: to see that it runs")
    epochs = 1 if parser.parse_args().quick else 30

    digits: Any = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[order] / 8 - 1  # (n, 1, 8, 8)
    y = torch.tensor(digits.target)[order]
    x_train, y_train, x_test, y_test = x[:1200], y[:1200], x[1200:], y[1200:]

    torch.manual_seed(0)
    convolutions = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU())
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 16, 10))
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x_train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
    print(f"float32: {accuracy(model, x_test, y_test):.2%} of the test images")

    # Any tool may have rounded the weights. Here it is to nearest, with one scale for each tensor.
    quantized = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (param for param in quantized.parameters() if param.dim() > 1):
            scale = weight.abs().max() / 3
            weight.copy_((weight / scale).round() * scale)
    print(f"3 bits: {accuracy(quantized, x_test, y_test):.2%}")

    correction = opt8bit.ptq.correct(quantized, model, x_train[:512].split(64), held_out=x_train[512:].split(64))
    print(f"3 bits, corrected: {accuracy(quantized, x_test, y_test):.2%}")
    for module in correction.modules:
        print(f"  {module.name}: {module.place}, norm {module.norm:.3f}, {'kept' if module.is_kept else 'not kept'}")
