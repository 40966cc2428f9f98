"""NVIDIA GPUs, through CUDA C++, NVRTC and the driver."""
