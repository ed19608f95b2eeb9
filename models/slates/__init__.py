"""Slates: Bayesian sequential recommendation with in-slate Thompson sampling."""

from __future__ import annotations

from probkit.models.slates import metrics, off_policy
from probkit.models.slates.draws import (
    ParameterDraws,
    draw_parameters,
    plug_in_parameters,
)
from probkit.models.slates.guide import SlateMeanField
from probkit.models.slates.log import SlateLog
from probkit.models.slates.loops import LoopResult, Refit, closed_loop, newcomer_loop
from probkit.models.slates.memory import fit_bytes
from probkit.models.slates.model import SlateGRU
from probkit.models.slates.online import carried_model, update_posterior
from probkit.models.slates.policies import (
    EpsilonGreedy,
    Greedy,
    InSlateThompson,
    Popularity,
    Random,
    Recommendation,
    Thompson,
    recommend,
    slate_propensities,
    slot_marginals,
)
from probkit.models.slates.prediction import click_log_probs, click_probs
from probkit.models.slates.priors import SlatePrior
from probkit.models.slates.simulator import MarketPlace, draw_market_place
from probkit.models.slates.two_phase import TwoPhase

__all__ = [
    "EpsilonGreedy",
    "Greedy",
    "InSlateThompson",
    "LoopResult",
    "MarketPlace",
    "ParameterDraws",
    "Popularity",
    "Random",
    "Recommendation",
    "Refit",
    "SlateGRU",
    "SlateLog",
    "SlateMeanField",
    "SlatePrior",
    "Thompson",
    "TwoPhase",
    "carried_model",
    "click_log_probs",
    "click_probs",
    "closed_loop",
    "draw_market_place",
    "draw_parameters",
    "fit_bytes",
    "metrics",
    "newcomer_loop",
    "off_policy",
    "plug_in_parameters",
    "recommend",
    "slate_propensities",
    "slot_marginals",
    "update_posterior",
]
