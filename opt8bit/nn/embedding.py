"""StableEmbedding: the embedding that the paper on 8-bit optimizers proposes for stable training of language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StableEmbedding(nn.Embedding):
    """Embeds tokens as ``nn.Embedding``, with Xavier-uniform weights, a layer norm and 32-bit optimizer states.

    ``y = LayerNorm(weight[input])``. Rare tokens get large gradients once in a while; the norm bounds what they
    do to the layers above, and full states keep their own rows exact. Add position embeddings to the output,
    after the norm.

    The weight carries ``state_bits = 32``, which every optimizer of this package honours; the mark survives
    ``copy.deepcopy``, pickling, ``.to()`` and the loading of a state dict.

    The arguments are those of ``nn.Embedding``. A given ``_weight`` is taken as it is.

    Shape:
        input: ``(*)``, integers below ``num_embeddings``; output: ``(*, embedding_dim)``.

    Source: 8-bit Optimizers via Block-wise Quantization, section 2.3.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=self.weight.dtype)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))

    def _mark(self) -> None:
        # An attribute of the parameter itself, which no type of torch's declares.
        self.weight.state_bits = 32  # pyright: ignore[reportAttributeAccessIssue]

    # Parameters lose their attributes whenever torch makes new ones of them. These are the places where it does.

    def __setattr__(self, name: str, value: Any) -> None:  # when it is made, and by FSDP2
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, nn.Parameter):
            self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _apply(self, fn: Any, recurse: bool = True) -> StableEmbedding:
        super()._apply(fn, recurse)
        self._mark()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mark()


def replace_embeddings(model: nn.Module) -> nn.Module:
    """Replaces every ``nn.Embedding`` inside a model by a :class:`StableEmbedding`, in place.

    A replacement keeps its predecessor's weight, the very same parameter, so that ties to other layers and
    optimizers that hold it stay; only the layer norm is new. Use it before training: a trained model would have
    to learn to live with the norms. Subclasses of ``nn.Embedding`` are left alone; hooks on those replaced are gone.

    Args:
        model: any module; it may be an ``nn.Embedding`` itself.

    Returns:
        The model, or the replacement where the model itself is an ``nn.Embedding``.
    """
    replaced: dict[nn.Module, StableEmbedding] = {}

    def stable(embedding: nn.Embedding) -> StableEmbedding:
        if embedding not in replaced:
            new = StableEmbedding(
                embedding.num_embeddings,
                embedding.embedding_dim,
                embedding.padding_idx,
                embedding.max_norm,
                embedding.norm_type,
                embedding.scale_grad_by_freq,
                embedding.sparse,
                _weight=embedding.weight,
                device=embedding.weight.device,
                dtype=embedding.weight.dtype,
            )
            new.weight = embedding.weight
            replaced[embedding] = new.train(embedding.training)
        return replaced[embedding]

    if type(model) is nn.Embedding:
        return stable(model)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is nn.Embedding:
                setattr(module, name, stable(child))
    return model
