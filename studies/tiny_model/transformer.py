"""Text encoder and diffusion transformer for training, in plain PyTorch, with the official module names.

Written from wan22.md §2 and §3. One exact shortcut: of the 512 rows of text that cross-attention sees, all behind the
prompt are equal, so they are one row here whose score is raised by the logarithm of their number.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan22.parts import DitSpec, TextEncoderSpec, rope_split
from wan22.specs import PATCH, TEXT_TOKENS


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[B, n, D]`` → ``[B, heads, n, D / heads]``."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


# --- text encoder ----------------------------------------------------------------------------------------------------


class TextAttention(nn.Module):
    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        inner, self.heads = spec.heads * spec.head_width, spec.heads
        self.q, self.k, self.v = (nn.Linear(spec.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, spec.width, bias=False)
        nn.init.normal_(self.q.weight, std=(spec.width * spec.head_width) ** -0.5)
        for linear in (self.k, self.v, self.o):
            nn.init.normal_(linear.weight, std=spec.width**-0.5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (_heads(linear(x), self.heads) for linear in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0)
        result: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return result


class GatedFfn(nn.Module):
    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(spec.width, spec.ffn_width, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.fc2 = nn.Linear(spec.ffn_width, spec.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.gate(x) * self.fc1(x))
        return result


class PositionBias(nn.Module):
    """A bias per head and bucket of distance; buckets are exact below 8 and logarithmic up to 128 (wan22.md §3)."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.buckets, spec.heads)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.far = spec.max_distance

    def forward(self, count: int) -> Tensor:
        place = torch.arange(count)
        distance = place[None] - place[:, None]
        half = self.embedding.num_embeddings // 2
        exact = half // 2
        size = distance.abs()
        log = exact + (size.clamp(min=1).float() / exact).log() / math.log(self.far / exact) * (half - exact)
        bucket = torch.where(size < exact, size, log.long().clamp(max=half - 1)) + half * (distance > 0)
        result: Tensor = self.embedding(bucket).permute(2, 0, 1)[None]
        return result


class TextBlock(nn.Module):
    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(spec.width, spec.eps), RmsNorm(spec.width, spec.eps)
        self.attn, self.ffn = TextAttention(spec), GatedFfn(spec)
        self.pos_embedding = PositionBias(spec)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]) + mask)
        result: Tensor = x + self.ffn(self.norm2(x))
        return result


class TextEncoder(nn.Module):
    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocab, spec.width)
        self.blocks = nn.ModuleList(TextBlock(spec) for _ in range(spec.layers))
        self.norm = RmsNorm(spec.width, spec.eps)
        nn.init.normal_(self.token_embedding.weight, std=0.5)

    def forward(self, ids: Tensor, present: Tensor) -> Tensor:
        """Embeddings ``[B, n, width]`` of ids ``[B, n]``; rows that are not ``present`` are zero."""
        mask = torch.zeros(present.shape).masked_fill(~present, -1e9)[:, None, None]
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, mask)
        result: Tensor = self.norm(x) * present[..., None]
        return result


# --- transformer -----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        width, self.heads = spec.width, spec.heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RmsNorm(width, spec.eps), RmsNorm(width, spec.eps)

    def forward(
        self, x: Tensor, source: Tensor, turns: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)
        q, k, v = (_heads(part, self.heads) for part in (q, k, v))
        if turns is not None:
            q, k = _turned(q, *turns), _turned(k, *turns)
        scores = (q.to(v.dtype) @ k.to(v.dtype).mT).float() * q.shape[-1] ** -0.5  # faster here than torch's fused one
        weights = (scores if bias is None else scores + bias).softmax(-1)
        result: Tensor = self.o((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return result


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Neighbouring channels ``(2j, 2j + 1)`` turned by the position's angles."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)


def rotations(spec: DitSpec, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[L, pairs]`` of every token's angles (wan22.md §2.2)."""
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [
        place.flatten()[:, None] * 10000 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        for place, pairs in zip(places, rope_split(spec.head_width), strict=True)
    ]
    joined = torch.cat(angles, 1)
    return joined.cos().float(), joined.sin().float()


class Block(nn.Module):
    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        width = spec.width
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.modulation.data[:, [2, 5]] = 0.5  # gates that are open from the start
        self.self_attn, self.cross_attn = Attention(spec), Attention(spec)
        self.norm1 = nn.LayerNorm(width, spec.eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, spec.eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(width, spec.eps)
        self.ffn = nn.Sequential(
            nn.Linear(width, spec.ffn_width), nn.GELU(approximate="tanh"), nn.Linear(spec.ffn_width, width)
        )

    def forward(self, x: Tensor, e: Tensor, text: Tensor, bias: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        m = (self.modulation + e).unsqueeze(2).unbind(1)
        a = self.norm1(x) * (1 + m[1]) + m[0]
        x = x + self.self_attn(a, a, turns) * m[2]
        x = x + self.cross_attn(self.norm3(x), text, bias=bias)
        result: Tensor = x + self.ffn(self.norm2(x) * (1 + m[4]) + m[3]) * m[5]
        return result


class Head(nn.Module):
    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.width, spec.eps, elementwise_affine=False)
        self.head = nn.Linear(spec.width, math.prod(PATCH) * spec.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, spec.width) / spec.width**0.5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[:, None]).unsqueeze(2).unbind(1)
        result: Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return result


class Dit(nn.Module):
    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        width, self.spec = spec.width, spec
        self.patch_embedding = nn.Conv3d(spec.in_channels, width, PATCH, PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(spec.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.time_embedding = nn.Sequential(nn.Linear(spec.freq_width, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.head = Head(spec)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, present: Tensor) -> Tensor:
        """The velocity, of the latents' shape; see :meth:`outputs`."""
        return self.outputs(latents, timestep, text, present)[0]

    def outputs(self, latents: Tensor, timestep: Tensor, text: Tensor, present: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The velocity, of the latents' shape, and the tokens ``[B, L, D]`` behind each block.

        Args:
            latents: ``[B, z, T, h, w]``, normalised, noisy.
            timestep: ``[B]``, 0…1000.
            text: ``[B, n, text_width]``, rows that are not ``present`` zero.
            present: ``[B, n]``, what of the text is prompt.
        """
        b, _, t, h, w = latents.shape
        grid = (t, h // PATCH[1], w // PATCH[2])
        e = self.time_embedding(_sinusoid(timestep, self.spec.freq_width)).float()
        e0 = self.time_projection(e).float().unflatten(1, (6, -1))
        text, bias = self._context(text, present)
        x = self.patch_embedding(latents).flatten(2).transpose(1, 2).float()
        turns = rotations(self.spec, grid)
        tokens = []
        for block in self.blocks:
            x = block(x, e0, text, bias, turns)
            tokens.append(x)
        y = self.head(x, e).float().unflatten(-1, (*PATCH[1:], -1)).unflatten(1, grid)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, t, h, w), tokens

    def _context(self, text: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded rows with one for all unused rows behind them, and the scores to add, ``[B, 1, 1, n + 1]``."""
        rows = self.text_embedding(F.pad(text, (0, 0, 0, 1)))
        unused = (TEXT_TOKENS - present.sum(1, keepdim=True)).float().log()
        bias = torch.zeros(present.shape).masked_fill(~present, -1e9)
        return rows, torch.cat([bias, unused], 1)[:, None, None]


def _sinusoid(timestep: Tensor, width: int) -> Tensor:
    half = width // 2
    angles = timestep.double()[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], 1).float()
