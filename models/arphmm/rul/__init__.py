"""Remaining useful life: health indicators, three estimators, calibration, decisions, scores."""

from __future__ import annotations

from probkit.models.arphmm.rul.conformal import CalibratedLife, ConformalLife
from probkit.models.arphmm.rul.decision import MaintenancePlan, plan_maintenance
from probkit.models.arphmm.rul.failure import Failure, phase_type_life, simulate_life
from probkit.models.arphmm.rul.health import HealthIndicator
from probkit.models.arphmm.rul.metrics import coverage_by_band, life_scores, phm08_score
from probkit.models.arphmm.rul.regression import LifeRegression, TrailingFeatures
from probkit.models.arphmm.rul.simulator import Degradation, simulate_degradation

__all__ = [
    "CalibratedLife",
    "ConformalLife",
    "Degradation",
    "Failure",
    "HealthIndicator",
    "LifeRegression",
    "MaintenancePlan",
    "TrailingFeatures",
    "coverage_by_band",
    "life_scores",
    "phase_type_life",
    "phm08_score",
    "plan_maintenance",
    "simulate_degradation",
    "simulate_life",
]
