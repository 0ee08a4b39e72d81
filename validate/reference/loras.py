"""LoRAs of a bundle, merged into the reference's weights as they were merged into the engines'.

The bundle records file, hash, strength and experts; the files themselves are not part of it. The merge is export's
own, which is held against PyTorch in the tests: what is compared here is that the engines have it.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wan22.bundle import Manifest, MergedLora, sha256_of
from wan22.errors import UserError
from wan22.specs import ModelSpec

if TYPE_CHECKING:
    from export.checkpoint.checkpoint import Checkpoint
    from export.lora.merge import Lora


def with_loras(checkpoint: "Checkpoint", manifest: Manifest) -> "Checkpoint":
    """``checkpoint`` with the LoRAs of ``manifest`` merged into the weights of its experts when they are read.

    Raises:
        UserError: a LoRA file that is missing or not the one that was merged.
    """
    from export.lora.merge import merged

    loras = [_opened(record, manifest.spec) for record in manifest.loras]
    experts = {name: merged(checkpoint.weights[name], loras, name) for name in manifest.spec.experts}
    return replace(checkpoint, weights={**checkpoint.weights, **experts})


def _opened(record: MergedLora, spec: ModelSpec) -> "Lora":
    from export.lora.merge import EXPERTS, LoraChoice, open_lora

    path, put_back = Path(record.file), "put the file back that was merged, or export again"
    if not path.is_file():
        raise UserError(f"LoRA {path} is missing", "the file that the engines have merged", put_back)
    if (found := sha256_of(path)) != record.sha256:
        raise UserError(f"LoRA {path}: sha256 {found[:12]}…", f"{record.sha256[:12]}… of the engines", put_back)
    short = [name for name, expert in EXPERTS.items() if record.experts == (expert,)]
    return open_lora(LoraChoice(path, record.strength, *short), spec, ignore_unmatched=True)
