"""Sharpness of the loss where a model stands: curvature and rises nearby, with their caveats."""

from rightbatch.probes.sharpness.measure import measure_sharpness, measure_sharpness_at
from rightbatch.probes.sharpness.records import KeskarSharpness, SharpnessPoint, SharpnessRecord

__all__ = [
    "KeskarSharpness",
    "SharpnessPoint",
    "SharpnessRecord",
    "measure_sharpness",
    "measure_sharpness_at",
]
