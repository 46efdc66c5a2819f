"""C++ sources of the CPU kernels and the means to compile them at first use."""
