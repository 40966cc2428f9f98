"""The format `fp32`: IEEE single precision."""

from flashtune.kernels.formats.format import plain

FP32 = plain("fp32", 32, "float32", "F32", cpp="Float32")
