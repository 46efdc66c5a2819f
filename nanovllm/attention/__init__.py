"""Attention over the paged KV cache: the seam, the reference, and the backends."""
