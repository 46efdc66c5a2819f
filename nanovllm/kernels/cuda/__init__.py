"""CUDA C++ kernels, compiled at first use, for what Triton cannot say: bulk copies, clusters."""
