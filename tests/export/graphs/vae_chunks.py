"""The VAE graphs run chunk after chunk, and diffusers' AutoencoderKLWan with the same weights."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnxruntime as ort
import torch
from diffusers import AutoencoderKLWan

from export.checkpoint.keys import diffusers_names, vae_config
from export.checkpoint.schema import vae_tensors
from export.graphs.builder import FLOAT, Placed
from export.graphs.vae_decoder import vae_decoder
from export.graphs.vae_encoder import vae_encoder
from tests.export.conftest import made_up
from wan22.specs import SPECS

MODELS = ["t2v-a14b-tiny", "ti2v-5b-tiny"]  # VAE 2.1 and 2.2
HALVES = {"decoder": vae_decoder, "encoder": vae_encoder}


def write(g, weights, folder):
    """Save ``g`` with its weights as ``folder/name.onnx``."""
    placed, data = {}, bytearray()
    for key, value in g.weights.items():
        stored = weights[key].astype(value.dtype.numpy())
        placed[key] = Placed(f"{g.graph.name}.bin", len(data), stored.nbytes)
        data += stored.tobytes()
    (folder / f"{g.graph.name}.bin").write_bytes(data)
    g.bind(placed, folder)
    g.save(folder / f"{g.graph.name}.onnx")
    return folder / f"{g.graph.name}.onnx"


@dataclass
class Half:
    """The two graphs of a VAE's half in ONNX Runtime; remembers the outputs of its latest call."""

    first: ort.InferenceSession
    next: ort.InferenceSession

    @classmethod
    def of(cls, model, half, folder, compute=FLOAT):
        weights = made_up(vae_tensors(SPECS[model].vae))
        graphs = (HALVES[half](SPECS[model].vae, first, compute) for first in (True, False))
        return cls(*(ort.InferenceSession(write(g, weights, folder)) for g in graphs))

    def __call__(self, video, chunk):
        """Process ``video`` as its first frame and chunks of ``chunk`` frames; concatenate the results."""
        name = self.first.get_inputs()[0].name
        self.outputs = _named(self.first, {name: video[:, :, :1]})
        results = [next(iter(self.outputs.values()))]
        for start in range(1, video.shape[2], chunk):
            caches = {k.removeprefix("next_"): v for k, v in self.outputs.items() if k.startswith("next_")}
            self.outputs = _named(self.next, {name: video[:, :, start : start + chunk], **caches})
            results.append(next(iter(self.outputs.values())))
        return np.concatenate(results, axis=2)

    def caches(self):
        return [v for k, v in self.outputs.items() if k.startswith("next_cache_")]


def _named(session, inputs):
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))


@cache
def reference(model):
    spec = SPECS[model]
    module = AutoencoderKLWan(**{k: v for k, v in vae_config(spec).items() if not k.startswith("_")}).eval()
    names = diffusers_names("vae", spec)
    module.load_state_dict({names[k]: torch.from_numpy(v) for k, v in made_up(vae_tensors(spec.vae)).items()})
    return module


def statistics(model):
    """Mean and 1/std of the latents as applied by diffusers' pipelines."""
    vae = SPECS[model].vae
    return (
        torch.tensor(vae.latents_mean).view(1, -1, 1, 1, 1),
        1 / torch.tensor(vae.latents_std).view(1, -1, 1, 1, 1),
    )


@torch.no_grad()
def decoded(model, latents):
    """The frames of the whole video from one call."""
    mean, inverse_std = statistics(model)
    return reference(model).decode(torch.from_numpy(latents) / inverse_std + mean).sample.numpy()


@torch.no_grad()
def encoded(model, frames):
    """The normalised latents of the whole video from one call."""
    mean, inverse_std = statistics(model)
    return ((reference(model).encode(torch.from_numpy(frames)).latent_dist.mode() - mean) * inverse_std).numpy()
