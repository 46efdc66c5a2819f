"""Triton kernels: one file a family, each with its plain torch specification in the tests."""
