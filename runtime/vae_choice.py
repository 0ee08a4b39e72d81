"""How the VAE of a pipeline runs: whole, or in stages with pictures in strips, as memory needs it."""

from collections.abc import Callable, Iterator
from functools import cache

from runtime.arrays import F32
from runtime.block_backend import BlockOptions, most_strips
from runtime.engine import Engine
from runtime.vae import Spread, Stages, decode, decode_in_strips, encode, encode_in_strips, in_turns
from wan22.bundle import Bundle
from wan22.errors import UserError
from wan22.precision import Precision
from wan22.quantities import human_bytes, size_option
from wan22.residency import Video, engines_memory
from wan22.strips import Half, VaeStage, check_strips, half_of
from wan22.vae_memory import StagedVae, choices, choose_strips

SHARED: tuple[VaeStage, ...] = ("middle", "coarse", "fine")  # by the first chunk and later ones


class PipelineVae:
    """The VAE of ``bundle``, with strips for each half."""

    def __init__(
        self,
        bundle: Bundle,
        options: BlockOptions,
        free_bytes: float,
        cache_sets: int,
        spread: tuple[int, Spread] = (1, in_turns),
    ) -> None:
        """Open nothing.

        Args:
            bundle: the engines.
            options: the number of strips and the memory for one half, if the user has set them.
            free_bytes: the memory for one half otherwise.
            cache_sets: see :func:`wan22.residency.engines_memory`.
            spread: the number of devices that take strips, each at least one, and what hands them out.
        """
        self._bundle, self._cache_sets, asked = bundle, cache_sets, options.vae_strips
        self._devices, self._spread = spread
        self._asked, self._from_user = asked, options.vram is not None
        self._budget = free_bytes if options.vram is None else min(free_bytes, options.vram)
        vae = [component for component in bundle.manifest.components if component.name.startswith("vae")]
        self.in_stages: set[Half] = {half_of(component.name) for component in vae if component.stages}
        self._only_stages: set[Half] = {half_of(component.name) for component in vae if component.in_stages}
        self._most = most_strips(bundle)
        self.strips = cache(self._strips)

    def encode(self, frames: F32, engine: Callable[[str], Engine]) -> F32:
        """See :func:`runtime.vae.encode`; ``engine`` makes the engine of a component or of its stage, as "dit.qkv"."""
        video = (frames.shape[4], frames.shape[3], frames.shape[2])
        if (strips := self.strips("vae_encoder", video)) is not None:
            return encode_in_strips(self._stages("vae_encoder", engine), frames, strips, spread=self._spread)
        following = engine("vae_encoder_next") if frames.shape[2] > 1 else None
        return encode(engine("vae_encoder_first"), following, frames)

    def decode(self, latents: F32, engine: Callable[[str], Engine]) -> Iterator[F32]:
        """See :func:`runtime.vae.decode`, and :meth:`encode` for ``engine``."""
        spec, (count, height, width) = self._bundle.manifest.spec.vae, latents.shape[2:]
        stride = spec.spatial_stride
        video = (width * stride, height * stride, spec.temporal_stride * (count - 1) + 1)
        if (strips := self.strips("vae_decoder", video)) is not None:
            return decode_in_strips(self._stages("vae_decoder", engine), latents, strips, self._spread)
        return decode(engine("vae_decoder_first"), engine("vae_decoder_next") if count > 1 else None, latents)

    def engines(self, name: str) -> tuple[str, ...]:
        """The engines of the component ``name``: its own, or those of its stages if it does not run whole."""
        half = half_of(name)
        if not name.startswith("vae") or half not in self.in_stages:
            return (name,)
        if half not in self._only_stages and self._asked is None and self._devices == 1:
            return (name,)
        return (*(f"{half}_first.{stage}" for stage in SHARED), f"{name}.motion")

    def chosen(self, video: Video) -> dict[Half, int]:
        """The strips of the halves that run in stages.

        Raises:
            UserError: as :meth:`strips`.
        """
        halves = {half_of(c.name) for c in self._bundle.manifest.components if c.name.startswith("vae")}
        found = {half: self.strips(half, video) for half in sorted(halves)}
        return {half: count for half, count in found.items() if count is not None}

    def _strips(self, half: Half, video: Video) -> int | None:
        """The strips of ``half`` for ``video``; None to run it whole, which is done where it fits.

        Raises:
            UserError: too many strips for the picture; or no number fits into the user's budget.
        """
        manifest = self._bundle.manifest
        spec, shape = manifest.spec, manifest.spec.latent_shape(*video)
        if half in self.in_stages and self._asked is not None:
            check_strips(self._asked, (shape[3], shape[4]))
            return self._asked
        if self._devices > 1:
            return self._for_every_device(half, video)
        if half not in self._only_stages and self._whole_bytes(half, video) <= self._budget:
            return None
        if half in self.in_stages:
            precision, sets = self._precisions(half)[f"{half}_first"], self._cache_sets
            found = choose_strips(spec.vae, half, precision, shape, self._budget, cache_sets=sets, most=self._most)
            if found is not None:
                return found.strips
        if self._from_user:
            raise self._refusal(half, video)
        return self._least(half, video).strips if half in self.in_stages else None

    def _for_every_device(self, half: Half, video: Video) -> int:
        """The fewest strips that fit, a multiple of the devices where that is possible."""
        spec, sets = self._bundle.manifest.spec, self._cache_sets
        precision, shape = self._precisions(half)[f"{half}_first"], spec.latent_shape(*video)
        found = choose_strips(spec.vae, half, precision, shape, self._budget, cache_sets=sets, most=self._most)
        fitting = self._devices * -(-(found.strips if found else 1) // self._devices)
        return min(fitting, self._most or fitting, max(shape[3:]))

    def _precisions(self, half: Half) -> dict[str, Precision]:
        return {c.name: c.precision for c in self._bundle.manifest.components if c.name.startswith(half)}

    def _whole_bytes(self, half: Half, video: Video) -> float:
        spec, precisions = self._bundle.manifest.spec, self._precisions(half)
        every = engines_memory(spec, precisions, video, cache_sets=self._cache_sets).values()
        return max(each.weights + each.scratch + each.inputs_and_outputs for each in every)

    def _least(self, half: Half, video: Video) -> StagedVae:
        """The strips that need the least memory."""
        spec, precision = self._bundle.manifest.spec, self._precisions(half)[f"{half}_first"]
        every = choices(spec.vae, half, precision, spec.latent_shape(*video), cache_sets=self._cache_sets)
        return min((c for c in every if c.strips <= (self._most or c.strips)), key=lambda each: each.total)

    def least_bytes(self, video: Video) -> float:
        """The least memory in which every half runs."""
        halves = {half_of(c.name) for c in self._bundle.manifest.components if c.name.startswith("vae")}
        staged = (self._least(half, video).total for half in halves & self.in_stages)
        return max([0.0, *staged, *(self._whole_bytes(half, video) for half in halves - self.in_stages)])

    def _refusal(self, half: Half, video: Video) -> UserError:
        ways = []
        if half == "vae_decoder" and self._precisions(half)[f"{half}_first"] is not Precision.FP16:
            ways.append("export with --vae-decoder fp16")
        if half not in self.in_stages or self._least(half, video).strips == self._most:
            ways.append("build with more --vae-strips" if half in self.in_stages else "build with --vae-strips 4")
        least = size_option(self.least_bytes(video))
        remedy = " or ".join([f"give --vram {least}, use a smaller --size", *ways])
        return UserError(f"--vram {human_bytes(self._budget)} for {half}", f"at least {least}", remedy)

    def _stages(self, half: Half, engine: Callable[[str], Engine]) -> Stages:
        first, following = f"{half}_first", f"{half}_next"
        middle, coarse, fine = (engine(f"{first}.{stage}") for stage in SHARED)
        names = {component.name for component in self._bundle.manifest.components}
        later = engine(f"{following}.motion") if following in names else None
        return Stages(self._bundle.manifest.spec.vae, middle, engine(f"{first}.motion"), later, coarse, fine)
