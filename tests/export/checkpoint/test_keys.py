"""The key maps are bijections onto the modules of diffusers and transformers, shapes included."""

from dataclasses import replace

import pytest

from export.checkpoint.keys import diffusers_names, dit_config, text_encoder_config, vae_config
from export.checkpoint.schema import part_tensors
from wan22.specs import SPECS, T2V_A14B

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# Layers beyond the second have the names of the second with another number; building all 40 only takes time.
MODELS = [
    replace(s, dit=replace(s.dit, layers=2), text_encoder=replace(s.text_encoder, layers=2)) for s in SPECS.values()
]
every_model = pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)


def reference_shapes(build):
    with torch.device("meta"):
        module = build()
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def our_shapes(part, spec):
    names = diffusers_names(part, spec)
    assert len(set(names.values())) == len(names)
    return {names[name]: shape for name, shape in part_tensors(part, spec).items()}


def constructor_arguments(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


@every_model
def test_transformer_names(spec):
    config = constructor_arguments(dit_config(spec))
    assert our_shapes("dit", spec) == reference_shapes(lambda: diffusers.WanTransformer3DModel(**config))


@every_model
def test_vae_names(spec):
    config = constructor_arguments(vae_config(spec))
    assert our_shapes("vae", spec) == reference_shapes(lambda: diffusers.AutoencoderKLWan(**config))


@every_model
def test_text_encoder_names(spec):
    config = transformers.UMT5Config(**text_encoder_config(spec))
    expected = reference_shapes(lambda: transformers.UMT5EncoderModel(config))
    tied = {"encoder.embed_tokens.weight": expected["shared.weight"]}
    assert our_shapes("text_encoder", spec) | tied == expected


def test_the_second_decimal_of_a_layer_is_kept():
    names = diffusers_names("high_noise", T2V_A14B)
    assert names["blocks.39.cross_attn.norm_k.weight"] == "blocks.39.attn2.norm_k.weight"
    assert names["blocks.12.norm3.bias"] == "blocks.12.norm2.bias"
    assert diffusers_names("text_encoder", T2V_A14B)["blocks.23.attn.o.weight"] == (
        "encoder.block.23.layer.0.SelfAttention.o.weight"
    )
