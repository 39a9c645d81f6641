"""A small GPT of plain layers, for `language.py` and for tests: an embedding, layers, a norm and a readout."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

import localgrad as lg


class Embedding(nn.Module):
    """Tokens and their positions: int64 [B, L] -> [B, L, width]. Numbers start small, as those of GPT-2."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x) + self.position.weight[: x.shape[1]]


class Layer(nn.Module):
    """Causal attention and a perceptron, each behind a norm and added to its input: [B, L, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.taken, self.mixed = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.taken(self.norm(h)).chunk(3, 2)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        h = h + self.mixed(attended.transpose(1, 2).flatten(2))
        return h + self.perceptron(h)


class GPT(nn.Module):
    """Tokens int64 [B, L] -> what `lg.Readout` gives.

    Args:
        vocabulary: The number of tokens.
        context: The largest L.
        width: The features of a token.
        layers: The number of layers.
        heads: The heads of each attention.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, context, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.readout = lg.Readout(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for layer in self.layers:
            h = layer(h)
        return self.readout(self.norm(h))
