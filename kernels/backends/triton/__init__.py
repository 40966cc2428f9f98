"""GPUs, through Triton."""
