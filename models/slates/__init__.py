"""Slates: Bayesian sequential recommendation with in-slate Thompson sampling."""

from __future__ import annotations

from probkit.models.slates.log import SlateLog

__all__ = ["SlateLog"]
