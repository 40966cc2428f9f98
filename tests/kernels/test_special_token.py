"""Special tokens beside the logits that a step gives."""

import torch

from flashtune.kernels.epilogues.epilogue import FILL
from flashtune.kernels.head import FlashHead


def test_logits_have_special_tokens_and_no_padding() -> None:
    """A vocabulary that does not divide: its logits are as wide as it, special ones always in."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1003, 64, generator=generator)
    centroids = torch.nn.functional.normalize(torch.randn(63, 64, generator=generator), dim=1)
    hidden = torch.randn(3, 64, generator=generator)
    dense = hidden @ weight.T
    assignments = torch.arange(1003) % 63
    for n_probes in (2, 63):
        head = FlashHead(
            weight, centroids, assignments, n_probes=n_probes, special_token_ids=(5, 1)
        )
        logits = head.logits(hidden)
        assert logits.shape == dense.shape
        assert logits.is_contiguous()
        known = logits > FILL
        assert bool(known[:, [1, 5]].all())
        assert bool(known.all()) == (n_probes == 63)
        torch.testing.assert_close(logits[known], dense[known])
        assert torch.equal(logits.argmax(dim=1), head(hidden))
