"""Who runs the ranks."""
