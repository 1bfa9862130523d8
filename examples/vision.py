"""Rounds a small vision transformer to 4-bit weights and activations (W4A4), then corrects its outputs.

    pip install ".[examples]"
    python examples/vision.py

Takes 25 seconds. The images are scikit-learn's 1,797 handwritten digits. Rounding is simulated: the weights and
inputs of linear layers are rounded to 16 values, and computed with in float32.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import opt8bit
from opt8bit.quant import UniformGrid

SIZES: dict = {"intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_labels": 10}
GRID = UniformGrid(4)


def rounded(x: Tensor) -> Tensor:
    """Rounds to 16 evenly spaced values, from the least number of the tensor to the largest."""
    return GRID.nearest(x.reshape(1, -1), GRID.fit(x.reshape(1, -1))).view_as(x)


@torch.no_grad()
def quality(model: nn.Module, reference: nn.Module, x: Tensor, y: Tensor) -> str:
    logits, wanted = model(x).logits, reference(x).logits
    kl = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
    return f"{(logits.argmax(1) == y).double().mean():.2%} of the test images, KL divergence {kl:.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch: to see that it runs")
    epochs = 1 if parser.parse_args().quick else 40
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, y = torch.tensor(images).float().view(-1, 1, 8, 8)[order] / 8 - 1, torch.tensor(labels)[order]
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=64, **SIZES))
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=2e-3)
    for batch in (batch for _ in range(epochs) for batch in torch.randperm(1200).split(64)):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]).logits, y[batch]).backward()
        optimizer.step()

    quantized = copy.deepcopy(model.eval())
    for layer in (module for module in quantized.modules() if isinstance(module, nn.Linear)):
        layer.weight.data = rounded(layer.weight.data)
        layer.register_forward_pre_hook(lambda _, args: rounded(args[0]))
    print(f"float32: {quality(model, model, x[1200:], y[1200:])}")
    print(f"W4A4: {quality(quantized, model, x[1200:], y[1200:])}")
    opt8bit.ptq.correct(quantized, model, x[:900].split(64), held_out=x[900:1200].split(64), order="sequential")
    print(f"W4A4, corrected: {quality(quantized, model, x[1200:], y[1200:])}")
