"""VAE 2.1 for training: a whole clip at once, in plain PyTorch, with the official module names.

The official code runs in chunks with a cache per causal convolution; zero-initialised caches make that equal to one
pass over the whole clip with zeros in front, except that the first frame skips every time convolution (wan22.md §4.4).
``tests/studies`` holds this module against the reference's chunked one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan22.parts import VaeSpec

CONSTANT = 7  # the channel that begins as 1 everywhere


class CausalConv(nn.Conv3d):
    """A 3×3×3 or 1×1×1 convolution that sees the present and the two frames before it."""

    def __init__(self, entering: int, leaving: int, kernel: int) -> None:
        super().__init__(entering, leaving, kernel, padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor) -> Tensor:
        before = self.kernel_size[0] - 1
        return super().forward(F.pad(x, (0, 0, 0, 0, before, 0)) if before else x)


class _Normalise(torch.autograd.Function):
    """RMS over channels, with a backward pass that reads its input once: norms are half the cost of a small VAE."""

    @staticmethod
    def forward(context: Any, x: Tensor, gamma: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        inverse = (norm.square() / x.shape[1] + 1e-12).rsqrt().to(x.dtype)
        context.save_for_backward(x, inverse, gamma)
        result: Tensor = (x * inverse).mul_(gamma.to(x.dtype))
        return result

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, inverse, gamma = context.saved_tensors
        unit = x * inverse
        product = unit * gradients[0]
        others = (0, *range(2, x.ndim))
        for_gamma = product.sum(others, dtype=torch.float32).reshape(gamma.shape)
        weight = gamma.to(x.dtype)
        mean = product.mul_(weight).mean(1, keepdim=True)
        for_x = (gradients[0] * weight).addcmul_(unit, mean, value=-1).mul_(inverse)
        return for_x, for_gamma


class Norm(nn.Module):
    """RMS over the channels of each position; ``images``: for ``[B, C, h, w]``."""

    def __init__(self, channels: int, *, images: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * (2 if images else 3)))

    def forward(self, x: Tensor) -> Tensor:
        normalise: Any = _Normalise.apply
        normal: Tensor = normalise(x, self.gamma)
        return normal


class ResidualBlock(nn.Module):
    def __init__(self, entering: int, leaving: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            Norm(entering),
            nn.SiLU(),
            CausalConv(entering, leaving, 3),
            Norm(leaving),
            nn.SiLU(),
            nn.Dropout(0.0),
            CausalConv(leaving, leaving, 3),
        )
        self.shortcut = CausalConv(entering, leaving, 1) if entering != leaving else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.residual(x) + self.shortcut(x)
        return result


class AttentionBlock(nn.Module):
    """One head over the positions of each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width, images=True)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        images = x.transpose(1, 2).reshape(b * t, c, h, w)
        q, k, v = self.to_qkv(self.norm(images)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(b * t, c, h, w)
        result: Tensor = x + self.proj(mixed).reshape(b, t, c, h, w).transpose(1, 2)
        return result


class Down(nn.Module):
    """Half the rows and columns; with ``in_time`` half of the frames behind the first, too."""

    def __init__(self, width: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Tensor) -> Tensor:
        x = _per_frame(self.resample, x)
        if self.time_conv is None or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], 2)


class Up(nn.Module):
    """Twice the rows and columns, half the channels; with ``in_time`` two frames for each behind the first."""

    def __init__(self, width: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width // 2, 3, padding=1))
        self.time_conv = nn.Conv3d(width, 2 * width, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor) -> Tensor:
        if self.time_conv is not None and x.shape[2] > 1:
            later = self.time_conv(F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0)))
            earlier_half, later_half = later.chunk(2, 1)
            later = torch.stack([earlier_half, later_half], 3).flatten(2, 3)
            x = torch.cat([x[:, :, :1], later], 2)
        return _per_frame(self.resample, x)


def _per_frame(module: nn.Module, x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    y = module(x.transpose(1, 2).reshape(b * t, c, h, w).contiguous(memory_format=torch.channels_last))
    y = y.reshape(b, t, *y.shape[1:]).transpose(1, 2)
    result: Tensor = y.contiguous(memory_format=torch.channels_last_3d)
    return result


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width))


def _head(width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(Norm(width), nn.SiLU(), CausalConv(width, channels, 3))


class Encoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths = spec.encoder_widths
        self.conv1 = CausalConv(3, widths[0], 3)
        stages: list[nn.Module] = []
        for stage, width in enumerate(widths[1:]):
            stages += [ResidualBlock(widths[stage], width), ResidualBlock(width, width)]
            if stage < len(spec.temporal_down):
                stages += [Down(width, in_time=spec.temporal_down[stage])]
        self.downsamples = nn.Sequential(*stages)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * spec.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.middle(self.downsamples(self.conv1(x))))
        return result


class Decoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths, up_in_time = spec.decoder_widths, spec.temporal_down[::-1]
        self.conv1 = CausalConv(spec.latent_channels, widths[0], 3)
        self.middle = _middle(widths[0])
        stages: list[nn.Module] = []
        for stage, width in enumerate(widths[1:]):
            entering = spec.decoder_stage_input(stage)
            stages += [ResidualBlock(entering, width), ResidualBlock(width, width), ResidualBlock(width, width)]
            if stage < len(up_in_time):
                stages += [Up(width, in_time=up_in_time[stage])]
        self.upsamples = nn.Sequential(*stages)
        self.head = _head(widths[-1], 3)

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.head(self.upsamples(self.middle(self.conv1(z))))
        return result


def channels_last(module: nn.Module) -> None:
    """Lays the 3-D convolutions out with their channels innermost, which CPUs are fastest with."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last_3d)


@torch.no_grad()
def _initialise(vae: nn.Module) -> None:
    """Begins as a blurred copy: every channel is carried on, as means downwards and by repetition upwards.

    What is not carried begins random and looks at the present frame only; residual blocks begin as identities. Without
    this a small VAE takes hundreds of steps until it has colours.
    """
    for part in vae.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            _carry(part)
    for part in vae.modules():
        if isinstance(part, ResidualBlock):
            next(part.residual[-1].parameters()).mul_(0.02)  # its weight
        if isinstance(part, AttentionBlock):
            part.proj.weight.mul_(0.02)
        if isinstance(part, Encoder | Decoder):  # a constant channel: norms would lose how bright a picture is
            part.conv1.weight[CONSTANT] = 0
            if part.conv1.bias is not None:
                part.conv1.bias[CONSTANT] = 1


def _carry(part: nn.Conv2d | nn.Conv3d) -> None:
    """Channel n of the input becomes channel n of the output, and of its second half where frames are doubled."""
    weight = part.weight[:, :, None] if part.weight.ndim == 4 else part.weight  # [leaving, entering, time, y, x]
    leaving, entering, times, side, _ = weight.shape
    weight.zero_()
    scale = 0.5 / (entering * side**2) ** 0.5
    weight[:, :, -1] = scale * torch.randn(leaving, entering, side, side)
    half = leaving // 2 if (times, leaving) == (3, 2 * entering) and side == 1 else leaving
    for channel in range(leaving):
        source = channel % half
        if source >= entering:
            continue
        if part.stride[-1] == 2:
            weight[channel, source, -1, :2, :2] += 1 / 4
        elif part.stride[0] == 2:
            weight[channel, source, 1:, 0, 0] += 1 / 2
        else:
            weight[channel, source, -1, side // 2, side // 2] += 1
    if part.bias is not None:
        part.bias.zero_()


class Vae(nn.Module):
    """Clips ``[B, 3, F, H, W]`` in [-1, 1] to latents ``[B, z, T, h, w]`` and back."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        z = spec.latent_channels
        self.encoder, self.decoder = Encoder(spec), Decoder(spec)
        self.conv1, self.conv2 = CausalConv(2 * z, 2 * z, 1), CausalConv(z, z, 1)
        _initialise(self)
        mean, std = torch.tensor(spec.latents_mean), torch.tensor(spec.latents_std)
        self.mean, self.std = mean[:, None, None, None], std[:, None, None, None]

    def encode(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, not normalised."""
        mean, log_variance = self.conv1(self.encoder(clips)).chunk(2, 1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """Clips, not clamped, of latents that are not normalised."""
        result: Tensor = self.decoder(self.conv2(latents))
        return result

    def normalised(self, clips: Tensor) -> Tensor:
        """The latents that the transformer works on."""
        return (self.encode(clips)[0] - self.mean) / self.std

    def pictured(self, normalised: Tensor) -> Tensor:
        """Clips in [-1, 1] of latents as the transformer makes them."""
        return self.decode(normalised * self.std + self.mean).clamp(-1, 1)
