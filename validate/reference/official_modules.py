"""The official Wan2.2 code, which runs in the separate process of :mod:`validate.reference.official`.

The modules come unchanged from a clone or the wheel. Four things around them are patched, in that process only. The
packages skip their ``__init__`` files, which import every task of the code and its dependencies. PyTorch's attention
replaces the official function, which accepts only half precision on CUDA, while this comparison is in float32
(wan22.md §9.12). ``torch.cuda.current_device``, which a default argument calls at import, works without CUDA. And 3-D
convolutions of one small sample take PyTorch's fast path, which it keeps for larger ones.
"""

import importlib
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from export.checkpoint.checkpoint import Checkpoint
from validate.reference.parts import F32, I64, timesteps_of, to_numpy
from wan22.errors import UserError
from wan22.specs import PATCH, TEXT_TOKENS, TRAIN_TIMESTEPS

PACKAGES = {"wan": "wan", **{f"wan.{name}": f"wan/{name}" for name in ("modules", "utils", "distributed")}}
FILES = ("modules/model.py", "modules/t5.py", "modules/tokenizers.py", "modules/vae2_1.py", "modules/vae2_2.py")
SLOW = 20480  # the most elements of a sample, without its columns, for which PyTorch leaves oneDNN aside on CPUs
SOLVERS = ("utils/fm_solvers.py", "utils/fm_solvers_unipc.py")
PIPELINES = {
    "t2v": ("text2video.py", "WanT2V"), "i2v": ("image2video.py", "WanI2V"), "ti2v": ("textimage2video.py", "WanTI2V"),
}  # fmt: skip


def check_clone(repo: Path) -> None:
    """Raises UserError if a file of the official code is missing."""
    for file in (*FILES, *SOLVERS, *(file for file, _ in PIPELINES.values())):
        if not (repo / "wan" / file).is_file():
            remedy = "make official, or git clone https://github.com/Wan-Video/Wan2.2 and name that folder"
            raise UserError(f"{repo} has no wan/{file}", "a clone of the official Wan2.2 code", remedy)


class Modules:
    """The official modules of one checkpoint, built on first use; only one expert stays loaded."""

    def __init__(self, repo: Path, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._spec = checkpoint, checkpoint.spec
        self._parts: dict[str, Any] = {}
        self._scheduler: Any = None
        self._code = _import_code(repo)

    def token_ids(self, prompt: str) -> I64:
        """Token ids ``[1, tokens]``, without padding."""
        ids, mask = self.tokenizer()([prompt], return_mask=True, add_special_tokens=True)
        tokens: I64 = ids[:, : int(mask.sum())].numpy()
        return tokens

    @torch.inference_mode()
    def embeddings(self, token_ids: I64) -> F32:
        """Embeddings ``[1, 512, text width]``; rows after the last token are zero."""
        count = token_ids.shape[1]
        ids, mask = torch.zeros(1, TEXT_TOKENS, dtype=torch.int64), torch.arange(TEXT_TOKENS)[None] < count
        ids[:, :count] = torch.from_numpy(token_ids)
        encoded = self.text_encoder()(ids, mask.to(torch.int64))
        return to_numpy(encoded * mask[..., None])

    @torch.inference_mode()
    def velocity(
        self, expert: str, latents: F32, timestep: float, text: F32, condition: F32 | None, first_frame: F32 | None
    ) -> F32:
        """The velocity ``[1, z, T, h, w]``; see :meth:`validate.reference.reference.Reference.velocity`."""
        model = self.expert(expert)
        time = timesteps_of(self._spec, latents.shape, timestep, clean_first_frame=first_frame is not None)
        grid = [side // step for side, step in zip(latents.shape[2:], PATCH, strict=True)]
        y = None if condition is None else [torch.from_numpy(condition[0])]
        tensors = [torch.from_numpy(latents[0])], time, [torch.tensor(text[0])]
        return to_numpy(model(*tensors, math.prod(grid), y=y)[0][None])

    @torch.inference_mode()
    def encode(self, video: F32) -> F32:
        """Normalised latents ``[1, z, T, h, w]`` of frames ``[1, 3, F, H, W]``."""
        return to_numpy(self.vae().encode(torch.from_numpy(video), self._scale()))

    @torch.inference_mode()
    def decode(self, latents: F32) -> F32:
        """Frames ``[1, 3, F, H, W]`` in [-1, 1]."""
        return to_numpy(self.vae().decode(torch.from_numpy(latents), self._scale()).clamp(-1, 1))

    def start_run(self, solver: str, steps: int, shift: float) -> tuple[F32, I64]:
        """Start a run of ``unipc`` or ``dpm++`` and return its sigmas [N+1] and timesteps [N]."""
        settings = {"num_train_timesteps": TRAIN_TIMESTEPS, "shift": 1, "use_dynamic_shifting": False}
        if solver == "unipc":
            self._scheduler = self._code["fm_solvers_unipc"].FlowUniPCMultistepScheduler(**settings)
            self._scheduler.set_timesteps(steps, device="cpu", shift=shift)
        else:
            code = self._code["fm_solvers"]
            self._scheduler = code.FlowDPMSolverMultistepScheduler(**settings)
            code.retrieve_timesteps(self._scheduler, device="cpu", sigmas=code.get_sampling_sigmas(steps, shift))
        return self._scheduler.sigmas.numpy(), self._scheduler.timesteps.numpy()

    def step(self, velocity: F32, index: int, latents: F32) -> F32:
        """The latents after step ``index`` of the run that :meth:`start_run` started."""
        timestep = self._scheduler.timesteps[index]
        moved = self._scheduler.step(torch.from_numpy(velocity), timestep, torch.from_numpy(latents), return_dict=False)
        return to_numpy(moved[0])

    # -- building

    def _part(self, name: str, build: Any) -> Any:
        if name not in self._parts:
            self._parts[name] = build()
        return self._parts[name]

    def tokenizer(self) -> Any:
        folder, kind = str(self._checkpoint.tokenizer), self._code["tokenizers"].HuggingfaceTokenizer
        return self._part("tokenizer", lambda: kind(folder, seq_len=TEXT_TOKENS, clean="whitespace"))

    def text_encoder(self) -> Any:
        return self._part("text_encoder", self._text_encoder)

    def expert(self, name: str) -> Any:
        """The transformer ``name``; the other one is given up."""
        for other in set(self._spec.experts) - {name}:
            self._parts.pop(other, None)
        return self._part(name, lambda: self._transformer(name))

    def vae(self) -> Any:
        return self._part("vae", self._vae)

    def _text_encoder(self) -> Any:
        text = self._spec.text_encoder
        attention = text.heads * text.head_width
        sizes = (text.vocab, text.width, attention, text.ffn_width, text.heads, text.layers, text.buckets)
        with torch.device("meta"):
            module = self._code["t5"].T5Encoder(*sizes, shared_pos=False)
        return self._fill(module, "text_encoder")

    def _transformer(self, expert: str) -> Any:
        dit, make = self._spec.dit, self._code["model"].WanModel
        config = {
            "model_type": str(self._spec.task),
            "in_dim": dit.in_channels,
            "dim": dit.width,
            "ffn_dim": dit.ffn_width,
            "freq_dim": dit.freq_width,
            "text_dim": dit.text_width,
            "out_dim": dit.out_channels,
            "num_heads": dit.heads,
            "eps": dit.eps,
        }
        with torch.device("meta"):
            module = make(**config, num_layers=dit.layers)
        module.freqs = make(**config, num_layers=0).freqs  # computed tables, neither loaded nor a buffer
        return self._fill(module, expert)

    def _vae(self) -> Any:
        vae = self._spec.vae
        sizes: dict[str, Any] = {
            "dim": vae.encoder_base,
            "z_dim": vae.latent_channels,
            "dim_mult": list(vae.multipliers),
            "num_res_blocks": vae.blocks_per_stage,
            "temperal_downsample": list(vae.temporal_down),
            **({"dec_dim": vae.decoder_base} if vae.residual else {}),
        }
        with torch.device("meta"):
            module = self._code["vae2_2" if vae.residual else "vae2_1"].WanVAE_(**sizes)
        return self._fill(module, "vae")

    def _scale(self) -> list[torch.Tensor]:
        vae = self._spec.vae
        return [torch.tensor(vae.latents_mean), 1.0 / torch.tensor(vae.latents_std)]

    def _fill(self, module: Any, part: str) -> Any:
        weights = self._checkpoint.weights[part]
        state = {name: torch.from_numpy(np.array(weights.read(name), np.float32)) for name in weights.names()}
        module.load_state_dict(state, strict=True, assign=True)
        return module.requires_grad_(False).eval()


def _import_code(repo: Path) -> dict[str, types.ModuleType]:
    """Import the official modules; returns them by file name."""
    warnings.filterwarnings("ignore", message=".*autocast.*")
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: 0
    for name, folder in PACKAGES.items():
        package = types.ModuleType(name)
        package.__path__ = [str(repo / folder)]
        sys.modules[name] = package
    if repo.name == "site-packages":  # beside the wheel are packages that our environment may lack; ours go first
        sys.path.append(str(repo))
    try:
        code = {
            Path(file).stem: importlib.import_module(f"wan.{file.removesuffix('.py').replace('/', '.')}")
            for file in (*FILES, *SOLVERS)
        }
    except ImportError as error:
        missing = f"pip install einops regex (the extra official), or {error.name}"
        remedy = missing if error.name else "use a clone of another version"
        raise UserError(f"the official code at {repo}: {error}", "its dependencies", remedy) from None
    vars(code["model"])["flash_attention"] = _attention
    functional.conv3d = _conv3d  # type: ignore[assignment]
    return code


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Attention on ``[B, L, heads, head]``. It needs no mask, since no row is padding here."""
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    out: torch.Tensor = functional.scaled_dot_product_attention(*by_head)  # type: ignore[misc, arg-type]
    return out.transpose(1, 2)


def _conv3d(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    """The convolution of ``x``, of two copies of it where one sample would take the slow path: tens of times faster."""
    if len(x) > 1 or x.device.type != "cpu" or x[..., 0].numel() > SLOW:
        return torch.conv3d(x, *arguments, **options)
    return torch.conv3d(x.expand(2, *x.shape[1:]), *arguments, **options)[:1]
