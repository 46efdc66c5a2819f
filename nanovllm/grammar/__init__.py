"""Compiles the forms that completions must have into constraints on their tokens."""
