"""A planted study, and one real plan made once."""

from __future__ import annotations

import pytest
from tests.report.planted import make_points, make_study

from rightbatch import load_workload
from rightbatch.plan import Plan, make_plan
from rightbatch.report.source import Source
from rightbatch.study.study import Study


@pytest.fixture(scope="session")
def study() -> Study:
    return make_study()


@pytest.fixture(scope="session")
def source(study: Study) -> Source:
    return Source(plan=None, study=study, points=make_points())


@pytest.fixture(scope="session")
def plan() -> Plan:
    return make_plan(load_workload("quadratic"), effort="race", budget="30s")


@pytest.fixture(scope="session")
def plan_source(plan: Plan) -> Source:
    return Source(plan=plan, study=None)
