"""What is done with the candidates' logits: the epilogues, one file each.

To add one: a file here with its `Epilogue`, a row in `MEMBERS`, and a partial in the templates of
each language. Nothing here imports torch before there is a tensor.
"""

from flashtune.kernels.epilogues.argmax import ARGMAX
from flashtune.kernels.epilogues.logits import LOGITS

MEMBERS = (ARGMAX, LOGITS)
