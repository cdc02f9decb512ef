"""What a plan says on the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
import small

from flows.plan_table import plan_rows
from pipelines import plan, pools
from pipelines.speed import Speed
from pipelines.wording import GCV_CAUTION

SPEED = Speed(entries=1e6, operations=1e9, worker=1e9, worker_single=2e9)


@pytest.mark.parametrize(("select", "cautioned"), [("gcv", True), ("loo", False)])
def test_a_criterion_that_ends_at_the_smallest_ridge_is_cautioned_against(
    samples: small.Samples, root: Path, select: str, cautioned: bool
) -> None:
    """Protects who has no validation data from taking the score of generalised cross-validation at its word."""
    one = samples.experiment(solve={"select": select})
    made = plan.make(one, pools.resolve(one), root, workers=2, worker_bytes=2**40, speed=SPEED)
    assert made.json()["select"] == select
    assert any(GCV_CAUTION in row for row in plan_rows(made)) == cautioned


@pytest.mark.parametrize(("method", "estimated"), [("tiled-cholesky", True), ("cholesky", False)])
def test_leave_one_out_by_probes_is_said_to_be_an_estimate(
    samples: small.Samples, root: Path, method: str, estimated: bool
) -> None:
    """Protects from reading an estimate as exact."""
    one = samples.experiment(solve={"select": "loo", "method": method})
    made = plan.make(one, pools.resolve(one), root, workers=2, worker_bytes=2**40, speed=SPEED)
    assert any("by leave-one-out" in row and "estimated" in row[2] for row in plan_rows(made)) == estimated
