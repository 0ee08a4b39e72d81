"""The limits of the parity ladder, each with its reason.

The ``fp32`` limits are the product's promise. Both sides compute the same formulas with the same float32 weights and
differ only in the order of additions, which random-walks a few units of 6e-8 through a component. For ``fp16`` and
``bf16`` the reference stays float32, so a limit must admit the rounding of every matrix product's operands (2**-11
and 2**-8 of their size) through all layers. For scale: an eight-layer transformer with random weights has an error of
0.9 % when it runs entirely in bf16 (wan22.md §10). fp16 rounds eight times finer, and its limits are tighter by as
much. ``fp8`` rounds 16 times coarser than bf16, but only in the matrix products of the transformer's blocks; its limits
leave room for real activations. ``int8`` has half of that error: its matrices and most rows err by 0.9 %, rows with
outliers by more, and linears where it would be more than FP8's 2.6 % belong in FP8.

These limits against float32 are necessarily wide. ``EXCESS`` separates export error from precision loss: it limits our
error divided by PyTorch's error in the same precision on the same inputs.

Values that no engine computes (token ids, noise levels, noise) do not depend on the precision.
"""

from dataclasses import dataclass
from typing import Literal

from validate.ladder.metrics import Metrics
from wan22.precision import Number, Precision

Measure = Literal["max_abs", "relative_l2", "psnr_db", "ssim", "lpips", "excess"]
AT_LEAST = frozenset({"psnr_db", "ssim"})  # measures of similarity, not of distance


@dataclass(frozen=True)
class Limit:
    """The bound of ``measure``: a lower bound for measures in ``AT_LEAST``, an upper bound for the others."""

    measure: Measure
    value: float
    reason: str

    @property
    def sign(self) -> str:
        return "≥" if self.measure in AT_LEAST else "≤"

    def accepts(self, metrics: Metrics) -> bool:
        found = self.found(metrics)
        return found >= self.value if self.measure in AT_LEAST else found <= self.value

    def found(self, metrics: Metrics) -> float:
        """The measured value; NaN if it was not measured, so that no comparison holds."""
        value: float | None = getattr(metrics, self.measure)
        return float("nan") if value is None else value


TOKEN_IDS = Limit("max_abs", 0, "another token is another prompt")
TIMESTEPS = Limit("max_abs", 0, "the model is trained on these numbers and the experts switch on them")
FRACTIONAL_TIMESTEPS = Limit("max_abs", 1.3e-4, "float32 of values up to 1000: two units in the last place")
SIGMAS = Limit("max_abs", 1e-6, "both lists are float32 of values up to 1; ten units in the last place")
PIXELS = Limit("max_abs", 1e-5, "the same filter in float32; one step of 8-bit colour is 800 times as much")
MASK = Limit("max_abs", 0, "zeros and ones")
NOISE = Limit("max_abs", 2e-6, "same generator; vectorised log and cos differ in the last place of values up to 6")
SOLVER = Limit("relative_l2", 1e-5, "the same velocities on both sides: float32 sums of a few terms a step")
SINUSOID = Limit("max_abs", 1e-6, "both computed in float64 and rounded to float32 once")
SINUSOID_OF_DIFFUSERS = Limit("max_abs", 1e-4, "an angle near 1000 has a spacing of 6e-5 in float32")


LPIPS = Limit("lpips", 0.1, "people can hardly distinguish pictures with a smaller distance (Zhang et al. 2018)")
CHANGES_DB = 3.0


@dataclass(frozen=True)
class Thresholds:
    """The limits of the engines' tensors in one precision."""

    text: Limit  # embeddings of the prompt
    velocity: Limit  # one pass through an expert
    latents: Limit  # after every step of the run
    vae: Limit  # one graph of the VAE on the reference's latents or pixels
    streaming: Limit  # coding in chunks against the reference's in one pass
    frames: Limit  # the final video of two runs that share only the checkpoint and the request
    ssim: Limit  # the worst frame of that video

    @property
    def changes(self) -> Limit:
        """The limit of the changes from frame to frame."""
        reason = f"errors of two frames add up: {CHANGES_DB:g} dB below the frames' own"
        return Limit("psnr_db", self.frames.value - CHANGES_DB, reason)


FP32 = Thresholds(
    text=Limit("relative_l2", 1e-4, "24 layers of float32 sums in another order"),
    velocity=Limit("relative_l2", 1e-5, "float32 sums in another order; a wrong formula shows from 1e-3 on"),
    latents=Limit("relative_l2", 1e-3, "a velocity's 1e-5, times guidance (up to 7) and the solver's history"),
    vae=Limit("relative_l2", 1e-4, "convolution kernels add in another order"),
    streaming=Limit("relative_l2", 1e-5, "the reference decodes latent by latent as well: chunks must not show"),
    frames=Limit("psnr_db", 60.0, "error of 1/1000 of the range, a quarter of one step of 8-bit video"),
    ssim=Limit("ssim", 0.999, "no structure of a picture is lost in noise of 60 dB"),
)
FP16 = Thresholds(
    text=Limit("relative_l2", 2e-3, "operands rounded to 2**-11 in each of 24 layers, float32 between them"),
    velocity=Limit("relative_l2", 2e-3, "an eighth of bf16's limit"),
    latents=Limit("relative_l2", 1e-2, "a velocity's 2e-3, times guidance and the solver's history"),
    vae=Limit("relative_l2", 5e-3, "some 30 convolutions in a row, operands rounded to 2**-11"),
    streaming=Limit("relative_l2", 5e-3, "as the single graph: caches are float32 and add nothing"),
    frames=Limit("psnr_db", 45.0, "about one step of 8-bit video; coding calls 40 dB visually lossless"),
    ssim=Limit("ssim", 0.99, "coding calls 0.98 visually lossless"),
)
BF16 = Thresholds(
    text=Limit("relative_l2", 1.6e-2, "operands rounded to 2**-8 in each of 24 layers, float32 between them"),
    velocity=Limit("relative_l2", 1.6e-2, "twice the 0.9 % measured on random weights, eight layers deep"),
    latents=Limit("relative_l2", 8e-2, "a velocity's 1.6e-2, times guidance and the solver's history"),
    vae=Limit("relative_l2", 4e-2, "some 30 convolutions in a row, operands rounded to 2**-8"),
    streaming=Limit("relative_l2", 4e-2, "as the single graph: caches are float32 and add nothing"),
    frames=Limit("psnr_db", 27.0, "eight times the error that fp16 may have"),
    ssim=Limit("ssim", 0.95, "grain differs, edges and surfaces do not"),
)
FP8 = Thresholds(
    text=BF16.text,
    velocity=Limit("relative_l2", 8e-2, "3 bits of mantissa: 2.6 % of an operand, 3.7 % of a product, and twice that"),
    latents=Limit("relative_l2", 2e-1, "a velocity's 8e-2, times guidance; the steps average out part of it"),
    vae=BF16.vae,
    streaming=BF16.streaming,
    frames=Limit("psnr_db", 20.0, "a tenth of the range: other details, the same picture"),
    ssim=Limit("ssim", 0.8, "other details, the same picture"),
)
INT8 = Thresholds(
    text=BF16.text,
    velocity=Limit("relative_l2", 4e-2, "half of fp8's: 0.9 % of a matrix, at most 2.6 % of a row that suits INT8"),
    latents=Limit("relative_l2", 1e-1, "a velocity's 4e-2, times guidance; the steps average out part of it"),
    vae=BF16.vae,
    streaming=BF16.streaming,
    frames=Limit("psnr_db", 26.0, "half the error that fp8 may have"),
    ssim=Limit("ssim", 0.9, "grain and some details differ"),
)
NVFP4 = Thresholds(
    text=BF16.text,
    velocity=Limit("relative_l2", 1.6e-1, "twice fp8's: 1 bit of mantissa, a scale for 16 numbers"),
    latents=Limit("relative_l2", 4e-1, "a velocity's 1.6e-1, times guidance; the steps average out part of it"),
    vae=BF16.vae,
    streaming=BF16.streaming,
    frames=Limit("psnr_db", 15.0, "twice the error that fp8 may have: the same scene"),
    ssim=Limit("ssim", 0.6, "other details, the same composition"),
)
EXCESS = Limit("excess", 1.5, "PyTorch's error in the same precision, plus half of it for rounding in other places")
BY_LINEARS = {
    Number.FP32: FP32,
    Number.FP16: FP16,
    Number.BF16: BF16,
    Number.FP8: FP8,
    Number.INT8: INT8,
    Number.NVFP4: NVFP4,
}


def thresholds_for(precision: Precision) -> Thresholds:
    return BY_LINEARS[precision.linears]
