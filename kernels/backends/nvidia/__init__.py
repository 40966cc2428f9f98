"""NVIDIA GPUs: each plan through the backend that builds it."""
