import pkgutil
import subprocess
import sys

import runtime

HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cupy", "matplotlib"}


def test_no_module_of_the_runtime_imports_a_heavy_library():
    modules = [f"runtime.{module.name}" for module in pkgutil.iter_modules(runtime.__path__)]
    script = f"import sys, {', '.join(modules)}; print(*(name.partition('.')[0] for name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert len(modules) >= 10
    assert not HEAVY & set(loaded)
