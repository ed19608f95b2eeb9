"""Relevance vector regression beside sklearn-rvm and fastrvm."""

from __future__ import annotations

from benchmarks.harness.spec import Agreement, Benchmark, Comparison, Contender
from benchmarks.sbl import _rvm

_CLOSE = Agreement(("rmse",), atol=0.02)

BENCHMARK = Benchmark(
    title="Relevance vector regression",
    question=(
        "How long does a fit to n noisy points of a sinc take, against sklearn-rvm (EM) and "
        "fastrvm (C++)?"
    ),
    workloads=({"n": 100}, {"n": 300}),
    contenders=(
        Contender(
            "probkit",
            _rvm.task(_rvm.probkit, lambda fit: len(fit.relevance_)),
            ("probkit", "torch", "scikit-learn"),
        ),
        Contender(
            "sklearn-rvm",
            _rvm.task(_rvm.sklearn_rvm, lambda fit: len(fit.relevance_)),
            ("sklearn-rvm", "scikit-learn"),
            env="rvm",
        ),
        Contender(
            "fastrvm",
            _rvm.task(_rvm.fastrvm, lambda fit: len(fit.relevance_vectors_)),
            ("fastrvm", "scikit-learn"),
            env="rvm",
        ),
    ),
    comparisons=(
        Comparison(ours="probkit", peer="sklearn-rvm", agreement=_CLOSE),
        Comparison(ours="probkit", peer="fastrvm", agreement=_CLOSE),
    ),
    repeats=5,
)
