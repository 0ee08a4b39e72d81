"""Load graphs in a child process before compiling them, because a damaged graph may crash the compiler."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.targets import Target, target_named
from wan22.errors import UserError

ROOT = str(Path(__file__).parents[1])
CHILD = f"import sys; sys.path.insert(0, {ROOT!r}); from engines.load_check import main; main(*sys.argv[1:])"
REFUSED = 3  # exit code


def check_loads(target: Target, graphs: Sequence[Path], again: str) -> None:
    """Refuse graphs that the backend of ``target`` cannot load or that crash it.

    Args:
        target: the target to build for.
        graphs: ONNX files.
        again: the remedy for the error.

    Raises:
        UserError: names the graph and the reason.
    """
    words = [sys.executable, "-P", "-c", CHILD, target.name, *map(str, graphs)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    *_, begun = ["", *(line for line in done.stdout.splitlines() if line.startswith("graph "))]
    name = begun.removeprefix("graph ")
    if done.returncode == REFUSED:
        found, expected = json.loads(done.stdout.splitlines()[-1])
        raise UserError(found, expected, again)
    if done.returncode < 0 and name:
        found = f"{name} crashes {target.backend} with signal {-done.returncode}"
        raise UserError(found, f"a graph that {target.backend} loads", again)
    raise RuntimeError(f"loading graphs in a child process failed: {done.stderr.strip()}")


def main(target_name: str, *graphs: str) -> None:
    """Run in the child: print the name of each graph before loading it, and the error of a bad one as the last line."""
    target = target_named(target_name)
    for path in map(Path, graphs):
        print(f"graph {path.name}", flush=True)
        try:
            _load_graph(target, path)
        except UserError as error:
            print(json.dumps([error.found, error.expected]), flush=True)
            sys.exit(REFUSED)


def _load_graph(target: Target, graph: Path) -> None:
    if target.backend == "onnxruntime-gpu":  # its 16-bit graphs do not load on a CPU
        check_valid(graph)
        return
    if target.backend != "onnxruntime":
        from engines.gpu.tensorrt_backend import check_parses

        check_parses(graph, target)
        return
    import onnxruntime

    options = onnxruntime.SessionOptions()  # for a fast load: no optimisation, weights stay in their files
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a different class for each error code
        reason = str(error).replace(str(graph), graph.name)
        raise UserError(f"{graph.name} does not load: {reason}", "a graph that onnxruntime loads", "") from error


def check_valid(graph: Path) -> None:
    """Raises UserError if the ONNX file ``graph`` is not a valid graph."""
    import onnx

    try:
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # several classes, of protobuf and of ONNX
        reason = str(error).replace(str(graph), graph.name).splitlines()[0]
        raise UserError(f"{graph.name} does not load: {reason}", "a valid ONNX graph", "") from error
