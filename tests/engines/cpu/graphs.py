"""Shared by the tests of the passes: a model's real blocks with synthetic weights, run before and after a pass."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from export.graphs.dit import dit_graph
from runtime.forward_inputs import rope_tables, time_features
from wan22.specs import SPECS

SPEC = replace(SPECS["t2v-a14b-tiny"].dit, layers=1)
GRID = (2, 4, 6)  # latent frames, rows and columns of tokens


def transformer(spec=SPEC):
    g = dit_graph(spec)
    rng = np.random.default_rng(0)
    for key, value in g.weights.items():
        array = rng.standard_normal(tuple(value.shape), dtype=np.float32) * (1 if "norm" in key else 0.05)
        value.const_value = ir.tensor(array, name=key)
    return ir.Model(g.graph, ir_version=11)


def kinds(model):
    return [node.op_type for node in model.graph.all_nodes()]


def inputs(spec=SPEC, text_rows=7):
    rng = np.random.default_rng(1)
    frames, rows, columns = GRID
    text = np.zeros((1, 512, spec.text_width), np.float32)
    text[:, :text_rows] = rng.standard_normal((1, text_rows, spec.text_width))
    cos, sin = rope_tables(spec.head_width, *GRID)
    condition = (1, spec.condition_channels, frames, 2 * rows, 2 * columns)
    given = {"condition": rng.standard_normal(condition, dtype=np.float32)} if spec.condition_channels else {}
    return given | {
        "latents": rng.standard_normal((1, spec.out_channels, frames, 2 * rows, 2 * columns), dtype=np.float32),
        "time_features": time_features([500.0] * spec.time_rows, spec.freq_width),
        "text": text,
        "rope_cos": cos,
        "rope_sin": sin,
    }


def run(model, given):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    graph = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, given)[0]
