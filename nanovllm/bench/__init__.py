"""Measurements: workloads, the machine's ceilings, and reports that say what was measured."""
