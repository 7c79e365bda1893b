"""Graphs of ATen operations lowered, node by node, to JAX.

`LOWERINGS` maps the name of an ATen overload to a function with the overload's arguments. The
result's shape is compared with the one torch computed, and cast to torch's dtype, so a lowering
states only the mathematics.
"""

from rightbatch.engines.lowering.graph import LOWERINGS, lower

__all__ = ["LOWERINGS", "lower"]
