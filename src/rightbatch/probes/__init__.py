"""Probes: short measurements of a workload that leave it exactly as they found it."""
