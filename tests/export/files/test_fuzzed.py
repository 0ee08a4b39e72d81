"""Whatever a damaged file of weights holds, it is read or refused in one line, and takes no memory that it promises."""

import random
import resource

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from export.checkpoint.part_files import read_part
from export.lora.inspection import inspect_weights
from export.lora.merge import LoraChoice, open_lora
from wan22.errors import UserError
from wan22.specs import spec_named

SPEC = spec_named("ti2v-5b-tiny")
ROUNDS = 600
GROWTH_MAX_BYTES = 2**30


def seeds(folder):
    """A file of every format, each with scales or blocks."""
    matrix = torch.randn(64, 64)
    lora = {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 256), "blocks.0.ffn.0.lora_B.weight": torch.ones(512, 2)}
    fp8 = {"blocks.0.ffn.0.weight": matrix.to(torch.float8_e4m3fn), "blocks.0.ffn.0.scale_weight": torch.tensor(2.0)}
    safetensors.torch.save_file(lora | {"blocks.0.ffn.0.alpha": torch.tensor(1)}, folder / "lora.safetensors")
    safetensors.torch.save_file(fp8 | {"spiece_model": torch.zeros(9).byte()}, folder / "fp8.safetensors")
    torch.save({"state_dict": lora, "step": 3}, folder / "lora.pt")
    torch.save({"conv1.weight": torch.nn.Parameter(matrix), "conv2.weight": matrix.bfloat16()}, folder / "vae.pth")
    writer = gguf.GGUFWriter(folder / "x.gguf", "wan")
    writer.add_tensor("w", gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.add_tensor("b", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


def damaged(content, chance):
    """Bytes overwritten, inserted, removed, or the end cut off; most often where headers lie."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 6))):
        near = chance.choice((40, 400, len(content)))
        place = min(chance.randrange(near), len(content) - 1)
        place = len(content) - 1 - place if chance.random() < 0.3 else place
        kind = chance.randrange(5)
        if kind == 0:
            content[place] = chance.randrange(256)
        elif kind == 1:
            content[place : place + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\x7f\xff\xff\xff\xff\xff\xff\xff"))
        elif kind == 2:
            content[place:place] = chance.randbytes(chance.randrange(1, 9))
        elif kind == 3:
            del content[place : place + chance.randrange(1, 33)]
        elif chance.random() < 0.2:
            del content[place:]
        content = content or bytearray(b"x")
    return bytes(content)


@pytest.mark.parametrize("number", range(5))
def test_damaged_files_are_read_or_refused(tmp_path, number):
    (tmp_path / "seeds").mkdir()
    seed = seeds(tmp_path / "seeds")[number]
    chance, content = random.Random(number), seed.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    path = tmp_path / seed.name
    for _ in range(ROUNDS // 5):
        path.write_bytes(damaged(content, chance))
        for call in (
            lambda: inspect_weights(path),
            lambda: read_part(path, "high_noise"),
            lambda: open_lora(LoraChoice(path), SPEC),
        ):
            try:
                call()
            except UserError as error:
                assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < GROWTH_MAX_BYTES
