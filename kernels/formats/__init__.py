"""How weights and centroids are stored: the number formats, a file each.

To add one: a file here with its `Format`, a row in `MEMBERS`, and a partial in the templates of
each language that is to read it. Nothing here imports torch before there is a tensor: problems
check their formats' names, and are read without torch.
"""

from flashtune.kernels.formats.bf16 import BF16
from flashtune.kernels.formats.fp16 import FP16
from flashtune.kernels.formats.fp32 import FP32
from flashtune.kernels.formats.int4 import INT4
from flashtune.kernels.formats.int8 import INT8

MEMBERS = (BF16, FP16, FP32, INT8, INT4)
