"""Side-by-side runs of probkit and its peers.

One benchmark is one file, ``benchmarks/<family>/<name>.py``, that states the question, the
workloads, the contenders and the goal (see `benchmarks.harness.spec`). Every contender runs in a
process of its own, peers that need other packages also in an environment of their own
(``benchmarks/envs``). Results are JSON files under ``benchmarks/results``; ``docs/benchmarks.md``
and the table in the README are generated from them and from nothing else.

    python -m benchmarks list
    python -m benchmarks run [names] [--quick] [--gpu]
    python -m benchmarks report [--check]
    python -m benchmarks.envs create <peer>

This package and `benchmarks.harness.worker` import only the standard library, so that a peer's
environment needs nothing of ours.
"""
