"""How weights and centroids are stored: the number formats, a file each.

To add one: a file here with its `Format`, a row in `MEMBERS`, and a partial in the templates of
each language that is to read it. Nothing here imports torch before a tensor is there: problems
check their formats' names, and they are read without it.
"""

from flashtune.kernels.formats.bf16 import BF16
from flashtune.kernels.formats.fp16 import FP16
from flashtune.kernels.formats.fp32 import FP32

MEMBERS = (BF16, FP16, FP32)
