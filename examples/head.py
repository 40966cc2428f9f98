"""A FlashHead made from tensors: the best token, logits for sampling, and the kernel that runs.

python examples/head.py
"""

import torch

from flashtune import FlashHead

VOCAB, HIDDEN, CLUSTERS = 4096, 64, 256

# A head whose rows form clusters. `flashtune cluster` finds those of a real head.
torch.manual_seed(0)
centroids = torch.randn(CLUSTERS, HIDDEN)
assignments = torch.arange(VOCAB) % CLUSTERS  # the cluster of each token, all equally large
weight = centroids[assignments] + 0.3 * torch.randn(VOCAB, HIDDEN)

# Without tune="never" the first call races a few kernels, for up to 20 seconds; a toy needs none.
head = FlashHead(weight, centroids, assignments, n_probes=16, tune="never")
print(head)

hidden = weight[[7, 1234, 4000]] + 0.1 * torch.randn(3, HIDDEN)
print("FlashHead ", head(hidden).tolist())
print("dense head", (hidden @ weight.T).argmax(dim=1).tolist())

logits = head.logits(hidden)  # [tokens, vocab], -1e4 if a token is not a candidate
print("candidates", (logits > -1e4).sum(dim=1).tolist(), "of", VOCAB)

told = head.explain(n_tokens=3)
print("kernel    ", told["config"]["plan"], "on", told["device"])
