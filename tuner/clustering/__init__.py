"""FlashHead models from any causal model, and how good their clusters are."""
