"""One block of the transformer against the official block, from the same residual stream, modulation and text."""

from pathlib import Path

import numpy as np
import pytest

from export.checkpoint.checkpoint import open_checkpoint
from export.graphs.dit import dit_graph
from runtime.forward_inputs import forward_inputs
from studies.precision.session import fill, open_graph
from tests.validate.reference.test_official import needs_code, with_code
from validate.ladder.metrics import compare
from validate.reference import official
from validate.reference.official import Official

GRID = (3, 4, 6)  # latent frames, rows and columns of tokens
ENDS = {"x": "patch_embedding", "modulation": "time_projection", "context": "text_embedding"}


def official_block(expert, index, x, modulation, context):
    """Runs in the other process; ``modulation`` has a row per token."""
    import torch

    model = official._modules[0].expert(expert)
    sizes = {"seq_lens": torch.tensor([len(x)]), "grid_sizes": torch.tensor([GRID]), "context_lens": None}
    x, context = (torch.from_numpy(part)[None] for part in (x, context))
    e = torch.from_numpy(modulation).unflatten(1, (6, -1))[None]
    with torch.inference_mode():
        return model.blocks[index](x, e=e, freqs=model.freqs, context=context, **sizes)[0].numpy()


def streams(checkpoint, expert):
    """What enters and leaves every block of our graph, its modulation and its text."""
    spec, weights = checkpoint.spec, checkpoint.weights[expert]
    model = fill(dit_graph(spec.dit), lambda name: np.array(weights.read(name), np.float32))
    last = {}
    for node in model.graph:
        last[node.name.partition("/")[0]] = node.outputs[0]
    names = (*ENDS.values(), *(f"blocks.{index}" for index in range(spec.dit.layers)))
    model.graph.outputs.extend(last[name] for name in names)
    draw, dit = np.random.default_rng(3), spec.dit
    frames, rows, columns = GRID
    latents, condition = (
        draw.standard_normal((1, channels, frames, 2 * rows, 2 * columns), np.float32)
        for channels in (dit.out_channels, dit.condition_channels)
    )
    text = draw.standard_normal((1, 512, dit.text_width), np.float32)
    given = forward_inputs(
        dit, latents, 831.0, text, condition if dit.condition_channels else None, clean_first_frame=dit.time_rows > 1
    )
    return dict(zip(("velocity", *names), open_graph(model)(**given), strict=True))


@needs_code
@pytest.mark.parametrize("name", ["t2v-a14b-tiny", "i2v-a14b-tiny", "ti2v-5b-tiny"])
def test_a_block_computes_what_the_official_block_computes(flow_of, name):
    checkpoint = open_checkpoint(flow_of(name).checkpoint)
    repo: Path | None = with_code().official_repo
    assert repo is not None
    with Official(repo, checkpoint) as code:
        for expert in checkpoint.spec.experts:
            ours = streams(checkpoint, expert)
            rows = np.minimum(np.arange(GRID[0]), checkpoint.spec.dit.time_rows - 1).repeat(GRID[1] * GRID[2])
            entering = ours["patch_embedding"]
            for index in range(checkpoint.spec.dit.layers):
                leaving = ours[f"blocks.{index}"]
                given = entering, ours["time_projection"][rows], ours["text_embedding"]
                theirs = code._process.submit(official_block, expert, index, *given).result()
                assert compare(leaving, theirs).relative_l2 < 2e-6, (expert, index)
                assert compare(leaving - entering, theirs - entering).relative_l2 < 1e-5
                entering = leaving
