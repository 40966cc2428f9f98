"""The format `bf16`: bfloat16: the range of float32 in 16 bits."""

from flashtune.kernels.formats.format import plain

BF16 = plain("bf16", 16, "bfloat16", "BF16", cpp="BFloat16")
