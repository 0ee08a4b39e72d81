"""TensorRT and TensorRT-RTX engines, with weights embedded or bound at run time."""
