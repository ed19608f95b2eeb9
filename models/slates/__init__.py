"""Slates: Bayesian sequential recommendation with in-slate Thompson sampling."""

from __future__ import annotations

from probkit.models.slates.guide import SlateMeanField
from probkit.models.slates.log import SlateLog
from probkit.models.slates.model import SlateGRU
from probkit.models.slates.parameter_draws import (
    ParameterDraws,
    draw_parameters,
    plug_in_parameters,
)
from probkit.models.slates.prediction import click_log_probs, click_probs
from probkit.models.slates.priors import SlatePrior

__all__ = [
    "ParameterDraws",
    "SlateGRU",
    "SlateLog",
    "SlateMeanField",
    "SlatePrior",
    "click_log_probs",
    "click_probs",
    "draw_parameters",
    "plug_in_parameters",
]
