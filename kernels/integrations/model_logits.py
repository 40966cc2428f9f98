"""What a model does to its output head's logits before it returns them: scale, cap or nothing.

Usage:
    logits = ModelLogits(model, model.get_output_embeddings())
    logits(raw)          # [rows, vocab], as the model's forward would return them

Models scale and cap under many names, in their config or in code, so names are not checked: the
model is run on one token with the head's output replaced, and what it returns is the answer.
"""

from typing import Any

import torch
from torch import nn

from flashtune.kernels.epilogues.epilogue import FILL
from flashtune.tuning_db.errors import FlashtuneError

MOST_FILL = -100.0  # for the fill as returned: e^-100 over a vocabulary is negligible


class ModelLogits:
    """The model's own map from its head's logits to those that it returns."""

    def __init__(self, model: Any, head: nn.Module) -> None:
        """Nothing is run yet."""
        self._model, self._head = model, head

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """The logits `[rows, vocab]` that the model returns if its head gives `raw`.

        In the dtype of `raw`, unless the model converts them. Lets the model's exceptions through;
        raises FlashtuneError if it returns no such logits.
        """
        model, head = self._model, self._head
        weight = self._weight
        given = []

        def replaced(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            rows = raw.to(output.device)
            given.append(rows.view(len(raw), *[1] * (output.dim() - 2), -1))
            return given[-1].expand_as(output)

        token = torch.zeros((len(raw), 1), dtype=torch.int64, device=weight.device)
        inputs = {"input_ids": token}
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = token
        hook = head.register_forward_hook(replaced)
        devices = [weight.device] if weight.is_cuda else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):  # for dropout in training mode
                out = model(**inputs)
        finally:
            hook.remove()
        logits = getattr(out, "logits", None)
        if not given or not isinstance(logits, torch.Tensor) or logits.shape[0] != len(raw):
            raise FlashtuneError(
                f"{type(model).__name__} does not return its output head's logits, so FlashHead "
                "cannot replace it"
            )
        return logits.reshape(len(raw), -1, logits.shape[-1])[:, -1]

    @property
    def _weight(self) -> torch.Tensor:
        weight = self._head.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def why_not_filled(self) -> str | None:
        """None if the fill of non-candidate tokens stays far below every logit, else why not.

        Raises as a call does.
        """
        raw = torch.full((1, len(self._weight)), FILL, dtype=self._weight.dtype)
        raw[0, 0] = 0.0
        returned = self(raw)[0, 1:].float()
        if not len(returned):
            return None
        most = float(returned.max())
        if bool(returned.isfinite().all()) and most <= MOST_FILL:
            return None
        return (
            f"{type(self._model).__name__} caps or scales its logits: it returns {most:.4g} for "
            f"{FILL:g}, the fill of tokens that are not candidates, which is too close to the "
            "candidates' logits"
        )
