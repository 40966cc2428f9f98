"""The format `fp16`: IEEE half precision."""

from flashtune.kernels.formats.format import plain

FP16 = plain("fp16", 16, "float16", "F16", cpp="Float16")
