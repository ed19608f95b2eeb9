"""The set transformer of a prior-data fitted network.

Tokens: one for every observed pair (x, y), one for every query x, and a learned start token, which
lets a network predict from no data at all. There are no positions: a data set is a set. Every token
attends to the start and the observed tokens only, so a layer is one scaled-dot-product call with
keys and values of the observed tokens, and queries do not see one another.

Layers are pre-norm and start as the identity: the last map of each branch is zero at first.

Source: Mueller et al. (2022), "Transformers can do Bayesian inference", section 3; Adriaensen et
al. (2023). Both are post-norm with dropout; neither helps here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from probkit.errors import DataError

__all__ = ["PFNNetwork", "PFNSize", "SIZES"]


@dataclass(frozen=True)
class PFNSize:
    """Shape of a network.

    Attributes:
        width: Length of a token, a multiple of ``heads``.
        layers: Number of layers.
        heads: Attention heads.
        bars: Outputs of the head.
        features: Numbers that describe one x.
        targets: Numbers that describe one y.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    bars: int = 500
    features: int = 1
    targets: int = 1

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "bars", "features", "targets"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(f"{name}: expected a whole number >= 1, got {value!r}")
        if self.width % self.heads:
            raise DataError(f"width: expected a multiple of heads={self.heads}, got {self.width}")


SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (64, 2, 4),
    "small": (128, 4, 4),
    "medium": (256, 6, 4),
    "large": (256, 12, 4),
}
"""Width, layers and heads by name; "small" is for CPUs, "medium" and "large" ask for a GPU."""


class _Layer(nn.Module):
    """One pre-norm layer: attention to the observed tokens, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor, observed: int, mask: Tensor | None, first: int = 0) -> Tensor:
        """Return the next tokens [data set, token, width], from number ``first`` on."""
        batch, _, width = tokens.shape
        split = (self.heads, width // self.heads)
        normed = self.norm_attention(tokens)
        tokens = tokens[:, first:]
        count = tokens.shape[1]
        query = self.query(normed[:, first:]).unflatten(-1, split).transpose(1, 2)
        key, value = (
            part.unflatten(-1, split).transpose(1, 2)
            for part in self.key_value(normed[:, :observed]).chunk(2, -1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = tokens + self.out(mixed.transpose(1, 2).reshape(batch, count, width))
        return tokens + self.down(functional.gelu(self.up(self.norm_mlp(tokens))))


class PFNNetwork(nn.Module):
    """Logits of the predictive distribution at queries, given a set of observations.

    Args:
        size: Shape of the network.
        generator: Stream for the starting weights; torch's global one is left alone.

    Example:
        >>> net = PFNNetwork(PFNSize(32, 2, 4, bars=10), generator=torch.Generator().manual_seed(0))
        >>> net(torch.rand(5, 7, 1), torch.rand(5, 7, 1), torch.rand(5, 3, 1)).shape
        torch.Size([5, 3, 10])
    """

    def __init__(self, size: PFNSize, *, generator: torch.Generator) -> None:
        super().__init__()
        self.size = size
        with torch.device("meta"):
            self.embed_x = nn.Linear(size.features, size.width)
            self.embed_y = nn.Linear(size.targets, size.width)
            self.start = nn.Parameter(torch.empty(size.width))
            self.layers = nn.ModuleList(_Layer(size.width, size.heads) for _ in range(size.layers))
            self.norm = nn.LayerNorm(size.width)
            self.up = nn.Linear(size.width, 2 * size.width)
            self.head = nn.Linear(2 * size.width, size.bars)
        self.to_empty(device="cpu")
        self._fill(generator)

    @torch.no_grad()
    def _fill(self, generator: torch.Generator) -> None:
        """Draw starting weights: uniform at 1 / sqrt(fan in), branches ending in zero."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            for last in (layer.out, layer.down):
                last.weight.zero_()
                last.bias.zero_()
        self.start.normal_(0.0, 1.0, generator=generator)

    def forward(self, x: Tensor, y: Tensor, query: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits [data set, query, bar].

        Args:
            x: [data set, observed, feature] inputs observed.
            y: [data set, observed, target] outputs observed.
            query: [data set, query, feature] inputs asked for.
            lengths: [data set] how many of the observed entries count, in a padded batch; None
                counts all.
        """
        observed = self.embed_x(x) + self.embed_y(y)
        start = self.start.expand(x.shape[0], 1, -1)
        tokens = torch.cat([start, observed, self.embed_x(query)], 1)
        count = x.shape[1] + 1
        mask = None
        if lengths is not None:
            mask = torch.arange(count, device=x.device) <= lengths.unsqueeze(-1)
            mask = mask[:, None, None, :]
        *inner, last = self.layers
        for layer in inner:
            tokens = layer(tokens, count, mask)
        # Only queries are read in the end. Training works out the other tokens all the same: to the
        # last bit, that is the arithmetic by which the shipped weights came about.
        first = 0 if self.training else count
        tokens = last(tokens, count, mask, first)
        return self.head(functional.gelu(self.up(self.norm(tokens[:, count - first :]))))
