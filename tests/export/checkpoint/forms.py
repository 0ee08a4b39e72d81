"""Files of every published form, made from a checkpoint of ``synthesise``, and the values that they stand for."""

import json

import gguf
import numpy as np
import safetensors.torch
import torch
from sentencepiece import sentencepiece_model_pb2

from export.checkpoint.checkpoint import open_checkpoint
from export.checkpoint.keys import diffusers_names


def tensors_of(folder, part):
    weights = open_checkpoint(folder).weights[part]
    return {name: torch.from_numpy(np.array(weights.read(name), np.float32)) for name in weights.names()}


def save(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def comfy_text_encoder(folder, path, *, with_tokenizer=True):
    names = diffusers_names("text_encoder", open_checkpoint(folder).spec)
    tensors = {names[name]: tensor.half() for name, tensor in tensors_of(folder, "text_encoder").items()}
    model = torch.frombuffer(bytearray((folder / "google/umt5-xxl/spiece.model").read_bytes()), dtype=torch.uint8)
    return save(path, tensors | ({"spiece_model": model} if with_tokenizer else {}))


def comfy(folder, target, name):
    """The files of ComfyUI's templates, in a models folder; fp16, VAE bf16."""
    spec = open_checkpoint(folder).spec
    for expert in spec.experts:
        words = expert if expert != "dit" else "ti2v"
        half = {key: tensor.half() for key, tensor in tensors_of(folder, expert).items()}
        save(target / "diffusion_models" / f"wan2.2_{name}_{words}_fp16.safetensors", half)
    comfy_text_encoder(folder, target / "text_encoders" / "umt5_xxl_fp16.safetensors")
    save(target / "vae" / "wan_vae.safetensors", {k: t.bfloat16() for k, t in tensors_of(folder, "vae").items()})
    return target


def fp8_scaled(tensors, prefix=""):
    """As ComfyUI's: every matrix FP8 with a scale; and the values that this stands for."""
    written, expected = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            scale = tensor.abs().max() / 448
            written[prefix + name] = (tensor / scale).to(torch.float8_e4m3fn)
            written[prefix + name.removesuffix("weight") + "scale_weight"] = scale
            written[prefix + name.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
            expected[name] = written[prefix + name].float() * scale
        else:
            written[prefix + name] = tensor.half()
            expected[name] = tensor.half().float()
    return written, expected


def format_1(tensors, path, *, in_header):
    """ComfyUI's format 1.0 in FP8, described by a tensor for every layer or in the header; and what it stands for."""
    written, expected = fp8_scaled(tensors)
    del written["scaled_fp8"]
    written = {key.replace("scale_weight", "weight_scale"): tensor for key, tensor in written.items()}
    layers = [key.removesuffix(".weight_scale") for key in written if key.endswith("weight_scale")]
    told = {"format": "float8_e4m3fn"}
    if in_header:
        content = {"format_version": "1.0", "layers": dict.fromkeys(layers, told)}
        save(path, written, {"_quantization_metadata": json.dumps(content)})
    else:
        mark = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        save(path, written | {f"{layer}.comfy_quant": mark.clone() for layer in layers})
    return expected


def fp8_by_row(tensors, path):
    """LightX2V's FP8: the blocks' matrices with a scale for every row; and what it stands for."""
    written, expected = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.startswith("blocks."):
            scale = tensor.abs().amax(1, keepdim=True) / 448
            written[name] = (tensor / scale).to(torch.float8_e4m3fn)
            written[f"{name}_scale"] = scale
            expected[name] = written[name].float() * scale
        else:
            written[name] = expected[name] = tensor.bfloat16().float()
    save(path, written)
    return expected


def all_in_one(folder, path):
    """One file with every part of a 5B, as ComfyUI's CheckpointSave writes it."""
    names = diffusers_names("text_encoder", open_checkpoint(folder).spec)
    model = torch.frombuffer(bytearray((folder / "google/umt5-xxl/spiece.model").read_bytes()), dtype=torch.uint8)
    tensors = {f"model.diffusion_model.{k}": t.half() for k, t in tensors_of(folder, "dit").items()}
    text = tensors_of(folder, "text_encoder").items()
    tensors |= {f"text_encoders.umt5xxl.transformer.{names[k]}": t.half() for k, t in text}
    tensors |= {f"vae.{k}": t.half() for k, t in tensors_of(folder, "vae").items()}
    return save(path, tensors | {"text_encoders.umt5xxl.spiece_model": model})


def write_gguf(path, tensors, names=None, architecture="wan", model=None):
    """Matrices of blocks in Q8_0, the rest in float32; ``model`` is SentencePiece's, for the tokenizer inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer, expected = gguf.GGUFWriter(path, architecture), {}
    if model is not None:
        add_tokenizer(writer, model)
    for name, tensor in tensors.items():
        blocks = tensor.ndim == 2 and name.startswith("blocks.") and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if blocks else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(tensor.numpy(), kind) if blocks else tensor.numpy()
        expected[name] = gguf.dequantize(data, kind) if blocks else data
        writer.add_tensor((names or {}).get(name, name), data, raw_dtype=kind)
    finish_gguf(writer)
    return expected


def finish_gguf(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, model, *, kind="t5", charsmap=True, scores=True, tokens=None, padding=64):
    """SentencePiece's ``model`` as llama.cpp's converter stores it, padded to the rows of an embedding."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    count = len(pieces)
    pieces += [(f"[PAD{number}]", -10000.0, gguf.TokenType.UNUSED) for number in range(count, count + padding)]
    names, values, types = map(list, zip(*pieces, strict=True))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens or names)
    if scores:
        writer.add_token_scores(values)
    writer.add_token_types(types)
    if charsmap:
        table = proto.normalizer_spec.precompiled_charsmap if charsmap is True else charsmap
        writer.add_precompiled_charsmap(table)
