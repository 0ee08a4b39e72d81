"""Attention without the axis of a batch is for compilers that fuse it, and computes the same."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from engines.gpu.attention import drop_batch, writes_its_output
from engines.targets import TARGETS
from export.graphs.blocks import stage_graphs
from wan22.component import File
from wan22.specs import SPECS


@pytest.mark.parametrize(("target", "expected"), [("rtx4090", True), ("rtx5090", True), ("rtx3090", False)])
def test_it_is_for_the_targets_whose_compiler_fuses_it(target, expected):
    stages = {name: g.stage(File("", "", 0)) for name, g in stage_graphs(SPECS["ti2v-5b"].dit).items()}
    found = {name for name, stage in stages.items() if writes_its_output(stage, TARGETS[target])}
    assert found == ({f"attend_of_{count}" for count in (2, 3, 4, 6, 8)} if expected else set())
    assert not any(writes_its_output(stages["attend_of_4"], each) for each in (None, TARGETS["l40s"], TARGETS["h100"]))


def test_the_result_is_the_same(tmp_path):
    random, found = np.random.default_rng(0), []
    given = {name: random.standard_normal((11, 1, 128), np.float32) for name in "qkv"}
    for drops in (False, True):
        g = stage_graphs(SPECS["t2v-a14b-tiny"].dit)["attend_of_2"]
        g.edges()
        if drops:
            drop_batch(g.graph)
            assert not {"Squeeze", "Unsqueeze"} & {node.op_type for node in g.graph}
        g.save(tmp_path / "attend.onnx")
        onnx.checker.check_model(tmp_path / "attend.onnx", full_check=True)
        session = ort.InferenceSession(tmp_path / "attend.onnx", providers=["CPUExecutionProvider"])
        (value,) = session.run(["o_by_head"], {x.name: given[x.name] for x in session.get_inputs()})
        found.append(value)
    assert found[0].shape == found[1].shape == (1, 11, 128)
    assert np.allclose(*found, rtol=1e-6, atol=1e-7)
