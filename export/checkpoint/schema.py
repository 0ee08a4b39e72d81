"""Every tensor of a Wan2.2 checkpoint: official name → shape, derived from the spec (wan22.md §1.2, §1.4, §3, §4).

``synth`` writes these tensors, ``checkpoint`` requires them, and the export's graphs use them. Names are those of the
official release, to which all layouts are mapped. The order is that of execution, so streaming a checkpoint in this
order reads its files front to back.
"""

import itertools

from wan22.parts import DitSpec, TextEncoderSpec, VaeSpec
from wan22.specs import PATCH, ModelSpec

Shapes = dict[str, tuple[int, ...]]

DIT_LINEARS_PER_BLOCK = (
    *(f"self_attn.{name}" for name in "qkvo"),
    *(f"cross_attn.{name}" for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)  # the linears that LoRAs and quantisation change


def part_tensors(part: str, spec: ModelSpec) -> Shapes:
    """The tensors of one part of a checkpoint: an expert of ``spec`` (or "dit"), "text_encoder" or "vae"."""
    if part == "text_encoder":
        return text_encoder_tensors(spec.text_encoder)
    if part == "vae":
        return vae_tensors(spec.vae)
    if part == "dit" or part in spec.experts:
        return dit_tensors(spec.dit)
    raise KeyError(part)


def dit_tensors(spec: DitSpec) -> Shapes:
    """The diffusion transformer; all its linears have a bias, ``norm1`` and ``norm2`` have no parameters."""
    width, rows = spec.width, spec.out_channels * PATCH[0] * PATCH[1] * PATCH[2]
    shapes = _weight_and_bias("patch_embedding", (width, spec.in_channels, *PATCH))
    shapes |= _weight_and_bias("text_embedding.0", (width, spec.text_width))
    shapes |= _weight_and_bias("text_embedding.2", (width, width))
    shapes |= _weight_and_bias("time_embedding.0", (width, spec.freq_width))
    shapes |= _weight_and_bias("time_embedding.2", (width, width))
    shapes |= _weight_and_bias("time_projection.1", (6 * width, width))
    for layer in range(spec.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _dit_block(spec).items()}
    shapes |= {"head.modulation": (1, 2, width)}
    return shapes | _weight_and_bias("head.head", (rows, width))


def _dit_block(spec: DitSpec) -> Shapes:
    width = spec.width
    shapes: Shapes = {"modulation": (1, 6, width)}
    for attention in ("self_attn", "cross_attn"):
        if attention == "cross_attn":
            shapes |= _weight_and_bias("norm3", (width,))
        for name in "qkvo":
            shapes |= _weight_and_bias(f"{attention}.{name}", (width, width))
        shapes |= {f"{attention}.norm_{name}.weight": (width,) for name in "qk"}
    shapes |= _weight_and_bias("ffn.0", (spec.ffn_width, width))
    return shapes | _weight_and_bias("ffn.2", (width, spec.ffn_width))


def text_encoder_tensors(spec: TextEncoderSpec) -> Shapes:
    """The encoder half of umt5: no biases, one table of position biases per layer."""
    inner = spec.heads * spec.head_width
    shapes: Shapes = {"token_embedding.weight": (spec.vocab, spec.width)}
    for layer in range(spec.layers):
        block: Shapes = {"norm1.weight": (spec.width,)}
        block |= {f"attn.{name}.weight": (inner, spec.width) for name in "qkv"}
        block |= {"attn.o.weight": (spec.width, inner), "norm2.weight": (spec.width,)}
        block |= {f"ffn.{name}.weight": (spec.ffn_width, spec.width) for name in ("gate.0", "fc1")}
        block |= {"ffn.fc2.weight": (spec.width, spec.ffn_width)}
        block |= {"pos_embedding.embedding.weight": (spec.buckets, spec.heads)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (spec.width,)}


def vae_tensors(spec: VaeSpec) -> Shapes:
    """Encoder, the 1×1×1 convolutions around the latent, decoder."""
    z = spec.latent_channels
    shapes = _prefixed("encoder", _vae_encoder(spec))
    shapes |= _weight_and_bias("conv1", (2 * z, 2 * z, 1, 1, 1))
    shapes |= _weight_and_bias("conv2", (z, z, 1, 1, 1))
    return shapes | _prefixed("decoder", _vae_decoder(spec))


def _vae_encoder(spec: VaeSpec) -> Shapes:
    widths = spec.encoder_widths
    shapes = _weight_and_bias("conv1", (widths[0], 3 * spec.patch**2, 3, 3, 3))
    for stage, (entering, width) in enumerate(itertools.pairwise(widths)):
        modules = [_residual_block(entering, width)]
        modules += [_residual_block(width, width)] * (spec.blocks_per_stage - 1)
        if stage < len(spec.temporal_down):
            time: Shapes = {"time_conv": (width, width, 3, 1, 1)} if spec.temporal_down[stage] else {}
            modules += [_convolutions(time | {"resample.1": (width, width, 3, 3)})]
        for index, module in enumerate(modules):
            shapes |= _prefixed(vae_module("downsamples", spec, stage, index), module)
    return shapes | _middle(widths[-1]) | _head(widths[-1], 2 * spec.latent_channels)


def _vae_decoder(spec: VaeSpec) -> Shapes:
    widths, up_in_time = spec.decoder_widths, spec.temporal_down[::-1]
    shapes = _weight_and_bias("conv1", (widths[0], spec.latent_channels, 3, 3, 3)) | _middle(widths[0])
    for stage, width in enumerate(widths[1:]):
        modules = [_residual_block(spec.decoder_stage_input(stage), width)]
        modules += [_residual_block(width, width)] * spec.blocks_per_stage
        if stage < len(up_in_time):
            time: Shapes = {"time_conv": (2 * width, width, 3, 1, 1)} if up_in_time[stage] else {}
            leaving = width if spec.residual else width // 2
            modules += [_convolutions(time | {"resample.1": (leaving, width, 3, 3)})]
        for index, module in enumerate(modules):
            shapes |= _prefixed(vae_module("upsamples", spec, stage, index), module)
    return shapes | _head(widths[-1], 3 * spec.patch**2)


def vae_module(direction: str, spec: VaeSpec, stage: int, index: int) -> str:
    """The official name of module ``index`` of a stage: consecutive numbers in 2.1, nested in 2.2.

    ``direction`` is "downsamples" or "upsamples"; resampling follows the stage's residual blocks.
    """
    if spec.residual:
        return f"{direction}.{stage}.{direction}.{index}"
    modules = spec.blocks_per_stage + (1 if direction == "downsamples" else 2)
    return f"{direction}.{stage * modules + index}"


def _residual_block(entering: int, leaving: int) -> Shapes:
    shapes: Shapes = {"residual.0.gamma": (entering, 1, 1, 1)}
    shapes |= _weight_and_bias("residual.2", (leaving, entering, 3, 3, 3))
    shapes |= {"residual.3.gamma": (leaving, 1, 1, 1)}
    shapes |= _weight_and_bias("residual.6", (leaving, leaving, 3, 3, 3))
    if entering != leaving:
        shapes |= _weight_and_bias("shortcut", (leaving, entering, 1, 1, 1))
    return shapes


def _middle(width: int) -> Shapes:
    attention: Shapes = {"norm.gamma": (width, 1, 1)}
    attention |= _convolutions({"to_qkv": (3 * width, width, 1, 1), "proj": (width, width, 1, 1)})
    modules = (_residual_block(width, width), attention, _residual_block(width, width))
    return {k: v for i, module in enumerate(modules) for k, v in _prefixed(f"middle.{i}", module).items()}


def _head(width: int, channels: int) -> Shapes:
    return {"head.0.gamma": (width, 1, 1, 1)} | _weight_and_bias("head.2", (channels, width, 3, 3, 3))


def _convolutions(shapes: Shapes) -> Shapes:
    return {k: v for name, shape in shapes.items() for k, v in _weight_and_bias(name, shape).items()}


def _weight_and_bias(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
