"""What becomes of the candidates' logits: the epilogues, a file each.

To add one: a file here with its `Epilogue`, a row in `MEMBERS`, and a partial in the templates of
each language. Nothing here imports torch before a tensor is there.
"""

from flashtune.kernels.epilogues.argmax import ARGMAX
from flashtune.kernels.epilogues.logits import LOGITS

MEMBERS = (ARGMAX, LOGITS)
