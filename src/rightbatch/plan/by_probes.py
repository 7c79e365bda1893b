"""Batch and learning rate by probes and laws alone."""

from __future__ import annotations

import math

from rightbatch.laws.scaling import carry_rate
from rightbatch.plan.choice import Choice
from rightbatch.plan.predict import expected_critical_batch, predict_batch, predict_rate
from rightbatch.plan.price import open_sizes
from rightbatch.plan.reasons import probed_batch_reason, ramp_reason
from rightbatch.plan.records import Evidence, NearBest, Reason
from rightbatch.study.records import Cell


def choose_by_probes(evidence: Evidence) -> Choice:
    """What the probes say, where nothing was trained.

    Args:
        evidence: What was measured.

    Returns:
        The choice.
    """
    setting = evidence.setting
    critical = expected_critical_batch(evidence.noise_scale, averaging=setting.averaging)
    batch = predict_batch(
        evidence.throughput,
        critical,
        goal=setting.goal,
        num_examples=setting.num_examples,
        replicas=setting.replicas,
    )
    sizes = open_sizes(setting.num_examples, setting.replicas)
    low = min(sizes, key=lambda size: abs(math.log(size / (batch / 2.8))))
    high = min(sizes, key=lambda size: abs(math.log(size / min(2.8 * batch, low * 8))))
    ramp = evidence.learning_rate
    rate = predict_rate(ramp, averaging=setting.averaging, normalised=setting.normalised)
    carried = ""
    if ramp.global_batch != batch:
        rate = carry_rate(
            rate,
            at=ramp.global_batch,
            to=batch,
            critical_batch=critical,
            normalised=setting.normalised,
        )
        carried = f", carried from batch {ramp.global_batch} by the saturating law"
    return Choice(
        cell=Cell(global_batch=batch, learning_rate=rate),
        near_best=NearBest(low=low, high=max(high, low)),
        prediction=None,
        batch_reason=Reason(
            field="global_batch",
            because=probed_batch_reason(evidence, critical),
            source="noise and throughput probes",
        ),
        rate_reason=Reason(
            field="learning_rate",
            because=f"{ramp_reason(evidence)}{carried}.",
            source="learning-rate probe",
        ),
        warnings=(
            "No training was run: batch and learning rate follow from probes and laws, and can "
            "be several times off. effort='race' checks them.",
        ),
    )
