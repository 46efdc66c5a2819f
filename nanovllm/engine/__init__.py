"""Decisions: which sequences run, which blocks they own. Imports no torch."""
