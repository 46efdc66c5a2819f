"""Tensors on one rank: rows, batches, the model's step, sampling, loading."""
