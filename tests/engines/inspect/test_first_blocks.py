"""A graph cut to its first blocks computes what a model with that many blocks computes."""

import shutil
from dataclasses import replace

import numpy as np
import onnxruntime as ort

from engines.inspect.first_blocks import first_blocks
from export.checkpoint.schema import dit_tensors
from export.graphs.dit import dit_graph
from tests.engines.conftest import bound
from tests.export.conftest import made_up, run_graph
from tests.export.graphs.test_dit import inputs_for
from wan22.specs import SPECS

__all__ = ["run_graph"]  # a fixture of the export tests
FIVE = replace(SPECS["ti2v-5b-tiny"].dit, layers=5)


def test_the_first_blocks_of_a_model_are_a_model_of_that_many(run_graph, tmp_path):
    weights, inputs = made_up(dit_tensors(FIVE)), inputs_for(FIVE, 2, 4, 4, [0.0, 500.0])
    run_graph(dit_graph(FIVE), weights)
    cut = tmp_path / "cut"
    cut.mkdir()
    path = first_blocks(tmp_path / "graph.onnx", cut, 2)
    assert (cut / "weights.bin").is_symlink()
    (cut / "weights.bin").unlink()  # ONNX Runtime does not read weights through links
    shutil.copyfile(tmp_path / "weights.bin", cut / "weights.bin")
    found = ort.InferenceSession(path).run(None, inputs)[0]
    two = replace(FIVE, layers=2)
    assert np.array_equal(found, run_graph(dit_graph(two), weights)(**inputs)[0])


def test_a_graph_with_no_more_blocks_is_left_alone(tmp_path):
    g = dit_graph(replace(FIVE, layers=2))
    bound(g, tmp_path)
    g.save(tmp_path / "dit.onnx")
    assert first_blocks(tmp_path / "dit.onnx", tmp_path, 3) == tmp_path / "dit.onnx"
