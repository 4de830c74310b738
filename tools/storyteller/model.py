"""RWKV-7 to train, under the official tensor names (BlinkDL/RWKV-LM RWKV-v7/train_temp/src/model.py gives the recipe).

Parameters are float32; matrix products run in bfloat16, norms, decay and WKV in float32.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from wkv import wkv7

HEAD_SIZE = 64
GROUP_NORM_EPS = 64e-5


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight.to(torch.bfloat16))


def _low_rank(x: Tensor, down: Tensor, up: Tensor, between: str | None = None) -> Tensor:
    hidden = x @ down.to(torch.bfloat16)
    if between:
        hidden = getattr(torch, between)(hidden)
    return (hidden @ up.to(torch.bfloat16)).float()


def _shifted(x: Tensor) -> Tensor:
    """Each token's difference to the token before it; zero comes before the first."""
    return functional.pad(x, (0, 0, 1, -1)) - x


class Dropout(nn.Module):
    """Dropout with a byte of randomness a value, some five times as fast on a CPU as torch's own."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.cut = round(rate * 256)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.cut):
            return x
        words = torch.empty(-(-x.numel() // 7), dtype=torch.int64).random_()  # 63 random bits: seven whole bytes
        kept = words.view(torch.uint8).view(-1, 8)[:, :7].reshape(-1)[: x.numel()].view(x.shape) >= self.cut
        return x * kept.to(x.dtype).mul_(256 / (256 - self.cut))


class Matrix(nn.Module):
    """A bias-free linear layer, so that its tensor is called `<name>.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class TimeMix(nn.Module):
    def __init__(self, layer: int, layers: int, width: int, ranks: dict[str, int]) -> None:
        super().__init__()
        self.heads, self.first = width // HEAD_SIZE, layer == 0
        rest = 1 - layer / layers
        place, channel = torch.arange(width) / width, torch.arange(width)
        linear = channel / (width - 1) - 0.5
        zigzag = ((channel % HEAD_SIZE) - (HEAD_SIZE - 1) / 2) / ((HEAD_SIZE - 1) / 2)
        zigzag = zigzag * zigzag.abs()

        def row(x: Tensor) -> nn.Parameter:
            return nn.Parameter(x.expand(width).reshape(1, 1, width).clone())

        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            setattr(self, f"x_{name}", row(1 - place ** (power * rest)))
        for name, rank in ranks.items():
            if name == "v" and self.first:
                continue  # layer 0 gives v_first and mixes none
            setattr(self, f"{name}1", nn.Parameter(torch.zeros(width, rank)))
            setattr(self, f"{name}2", nn.Parameter(nn.init.orthogonal_(torch.empty(rank, width), gain=0.1)))
        self.w0 = row(-6 + 6 * (channel / (width - 1)) ** (1 + rest**0.3) + 0.5 + zigzag * 2.5)
        self.a0 = row(-0.19 + zigzag * 0.3 + linear * 0.4)
        if not self.first:
            self.v0 = row(0.73 - linear * 0.4)
        self.k_k, self.k_a = row(0.71 - linear * 0.1), row(torch.tensor(1.02))
        self.r_k = nn.Parameter(torch.full((self.heads, HEAD_SIZE), -0.04))

        def uniform(scale: float) -> Matrix:
            return Matrix((torch.rand(width, width) * 2 - 1) * scale / math.sqrt(width))

        self.receptance, self.key, self.value = uniform(0.5), uniform(0.05), uniform(0.5)
        self.output = Matrix(torch.zeros(width, width))
        self.ln_x = nn.GroupNorm(self.heads, width, eps=GROUP_NORM_EPS)
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / layers) ** 0.7)

    def forward(self, x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        heads = (batch, length, self.heads, HEAD_SIZE)
        delta = _shifted(x)
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, delta, getattr(self, f"x_{n}").to(x.dtype)) for n in "rwkvag")
        r = _linear(xr, self.receptance.weight).float()
        k = _linear(xk, self.key.weight).float()
        v = _linear(xv, self.value.weight).float()
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(self.w0 + _low_rank(xw, self.w1, self.w2, "tanh")))
        a = torch.sigmoid(self.a0 + _low_rank(xa, self.a1, self.a2))
        g = _low_rank(xg, self.g1, self.g2, "sigmoid")
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + _low_rank(xv, self.v1, self.v2)))
        kk = functional.normalize((k * self.k_k).view(heads), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        r, k, v = r.view(heads), k.view(heads), v.view(heads)
        y = wkv7(r, w.view(heads), k, v, -kk, kk * a.view(heads))
        y = self.ln_x(y.view(batch * length, width)).view(heads)
        y = y + (r * k * self.r_k).sum(-1, keepdim=True) * v
        out = _linear((y.view(batch, length, width) * g).to(torch.bfloat16), self.output.weight)
        return out, v_first


class ChannelMix(nn.Module):
    def __init__(self, layer: int, layers: int, width: int) -> None:
        super().__init__()
        place = torch.arange(width) / width
        self.x_k = nn.Parameter((1 - place ** ((1 - layer / layers) ** 4)).view(1, 1, width))
        self.key = Matrix(nn.init.orthogonal_(torch.empty(4 * width, width)))
        self.value = Matrix(torch.zeros(width, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(_linear(torch.addcmul(x, _shifted(x), self.x_k.to(x.dtype)), self.key.weight))
        return _linear(hidden * hidden, self.value.weight)


class Block(nn.Module):
    def __init__(self, layer: int, layers: int, width: int, ranks: dict[str, int], dropout: float) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att = TimeMix(layer, layers, width, ranks)
        self.ffn = ChannelMix(layer, layers, width)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        mixed, v_first = self.att(self.ln1(x).to(torch.bfloat16), v_first)
        x = x + self.drop(mixed)
        return x + self.drop(self.ffn(self.ln2(x).to(torch.bfloat16))), v_first


class RWKV7(nn.Module):
    """Token ids [batch, tokens] to logits [batch, tokens, vocab], each row from a zero state."""

    def __init__(self, layers: int, width: int, vocab: int, ranks: dict[str, int], dropout: float = 0.0) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        self.blocks = nn.ModuleList(Block(i, layers, width, ranks, dropout) for i in range(layers))
        self.ln_out = nn.LayerNorm(width)
        self.head = Matrix(nn.init.orthogonal_(torch.empty(vocab, width), gain=0.5 * math.sqrt(max(vocab / width, 1))))
        self.drop = Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(cast(Block, self.blocks[0]).ln0(self.emb(ids)))
        v_first = None
        for block in self.blocks:
            x, v_first = block(x, v_first)
        return _linear(self.ln_out(x).to(torch.bfloat16), self.head.weight)
