"""The disk space that engines take."""

from engines.targets import Target
from wan22.backends import runs_graphs
from wan22.bundle import Manifest
from wan22.residency import vae_weights_bytes
from wan22.specs import ModelSpec

# an engine and its log without the weights, as written by TensorRT-RTX 1.7.1 for SM89 and SM120
KERNELS_BYTES = {"text_encoder": 1.5e6, "vae": 7e6, "transformer": 4e6}
STAGES_BYTES = {"text_encoder": 2e6, "transformer": 6e6}  # the same of engines in stages, which experts share
KERNELS_PER_LAYER_BYTES = {"text_encoder": 0.5e6, "vae": 0.0, "transformer": 1.4e6}


def kernel_bytes(spec: ModelSpec, component: str) -> float:
    """The size on disk of the engine of ``component`` and its log, without the weights."""
    if component.startswith("vae"):
        return KERNELS_BYTES["vae"]
    part = "text_encoder" if component == "text_encoder" else "transformer"
    layers = spec.text_encoder.layers if component == "text_encoder" else spec.dit.layers
    return KERNELS_BYTES[part] + layers * KERNELS_PER_LAYER_BYTES[part]


def disk_bytes(manifest: Manifest, target: Target, *, in_blocks: bool) -> int:
    """The size of the engines built from the ONNX bundle of ``manifest``: weights, kernels and the builder's logs."""
    files, spec = manifest.files().values(), manifest.spec
    if runs_graphs(target.backend):  # copies, plus two graphs per transformer
        return sum(file.size_bytes for file in files) + 2 * sum(c.graph.size_bytes for c in manifest.components)
    total = float(sum(file.size_bytes for file in manifest.tokenizer))
    for component in manifest.components:
        if in_blocks and component.stages and not component.name.startswith("vae"):
            kind = "text_encoder" if component.name == "text_encoder" else "transformer"
            total += 0.0 if component.name in spec.experts[1:] else STAGES_BYTES[kind]
        else:
            total += kernel_bytes(spec, component.name)
        if component.name.startswith("vae"):  # both graphs store a copy of the weights that they use
            total += vae_weights_bytes(spec.vae, component.name, component.precision)
        else:
            total += sum(file.size_bytes for file in component.weights)
    return int(total)
