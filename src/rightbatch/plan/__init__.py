"""The main job: from a workload to a recipe, with its reasons."""

from rightbatch.plan.choose import choose
from rightbatch.plan.make import make_plan, probe, replay_plan
from rightbatch.plan.records import Evidence, Plan

__all__ = ["Evidence", "Plan", "choose", "make_plan", "probe", "replay_plan"]
