"""Discrete sites of Pyro programs, summed out exactly or drawn given the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from opt_einsum import shared_intermediates  # type: ignore[import-untyped]
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

__all__ = ["draw_enumerated", "log_marginal"]


class _Ring(LogRing):
    """Sums of products of densities given by their logarithms."""

    _backend = "probkit.pyro_adapter.log_einsum"


def log_marginal(trace: Trace) -> Tensor | float:
    """Return the log density of an enumerated trace, summed over the enumerated sites.

    Variables are eliminated plate by plate and, along ``pyro.markov``, step by step, as in Pyro's
    TraceEnum_ELBO with an empty guide: each enumerated dim has a symbol of its own, although dims
    are used again, and the weight of a subsampled plate stands outside of the logarithm.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    costs, factors, _, sum_dims, scale = _compute_model_factors(trace, Trace())
    terms = [term for group in costs.values() for term in group]
    if factors:
        with shared_intermediates() as cache:
            sizes: dict[str, int] = {}
            for factor in (f for group in factors.values() for f in group):
                sizes.update(zip(factor._pyro_dims, factor.shape, strict=True))
            ring = _Ring(cache=cache, dim_to_size=sizes)
            contracted: Any = contract_tensor_tree(OrderedDict(factors), sum_dims, ring=ring)
        terms += [
            packed.scale_and_mask(term, scale=scale)
            for group in contracted.values()
            for term in group
        ]
    total: Tensor | float = sum((term.sum() for term in terms), start=0.0)
    return total


def draw_enumerated(
    trace: Trace, replay: Callable[[], Trace], names: Sequence[str]
) -> dict[str, Tensor]:
    """Draw the enumerated sites of a trace from their joint law given everything else.

    Args:
        trace: An enumerated trace.
        replay: Runs the program again, without enumeration.
        names: The sites to return.
    """
    pruned = prune_subsample_sites(trace)
    pruned.compute_log_prob()
    pruned.pack_tensors()
    drawn: Trace = _sample_posterior_from_trace(replay, pruned, 1, False)
    return {name: drawn.nodes[name]["value"] for name in names}
