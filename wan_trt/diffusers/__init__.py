"""Engines behind the call that users of diffusers know: ``WanTrtPipeline`` in place of ``WanPipeline``.

It stands for ``WanImageToVideoPipeline`` and TI2V too: ``image`` is one of its arguments. The arguments have diffusers'
names and meaning. What differs:

* Arguments left out are the bundle's defaults: size, frames, steps and guidance are not 480x832, 81, 50 and 5.
* The shift is the bundle's too (12 for T2V-A14B), where the scheduler of a ``-Diffusers`` checkpoint may say 3.
  ``pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=3.0)`` changes it.
* Precision and device belong to the engines; ``torch_dtype`` and ``.to("cuda")`` change nothing.
* Without a torch generator and ``output_type="pt"`` torch is not imported, and latents are numpy arrays.

Source of the behaviour: diffusers' ``pipelines/wan``.
"""

from wan_trt.diffusers.pipeline import WanPipelineOutput, WanTrtPipeline

__all__ = ["WanPipelineOutput", "WanTrtPipeline"]
