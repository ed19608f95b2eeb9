"""Cells of the benchmarks of language models in Bayesian optimisation."""

from __future__ import annotations

import importlib

from benchmarks.bo._llm_cells import Plan, load, path_of, plans, save, stored


def test_cells_come_back(tmp_path):
    plan = Plan("guard", "Branin", "-", "faults 10 %", 3)
    save(plan, {"regret": [1.0, 0.5]}, tmp_path)
    assert load(path_of(plan, tmp_path)) == (plan, {"regret": [1.0, 0.5]})
    assert [p for p, _ in stored("guard", tmp_path)] == [plan] and not stored("cost", tmp_path)


def test_every_plan_has_a_file_of_its_own():
    every = [plan for kind in ("recorded", "guard", "quality", "cost") for plan in plans(kind)]
    assert len({path_of(plan).name for plan in every}) == len(every)


def test_regret_is_a_share_of_the_recorded_range():
    recorded = importlib.import_module("benchmarks.bo.llm_recorded")
    assert recorded._regret([0.5, 0.9, 0.7], 0.5, 0.9, "iris") == [1.0, 0.0, 0.0]
    assert recorded._regret([4.0, 1.0, 2.0], 1.0, 5.0, "griewank") == [0.75, 0.0, 0.0]


def test_stored_adversary_costs_at_most_a_tenth():
    """What stands in the repository keeps the bar: all seeds, final regret at most 1.1 times."""
    final = {name: {} for name in ("gp", "adversarial")}
    for plan, found in stored("guard"):
        if plan.method in final:
            final[plan.method][plan.seed] = found["regret"][-1]
    assert set(final["gp"]) == set(final["adversarial"]) == set(range(20))
    assert sum(final["adversarial"].values()) <= 1.1 * sum(final["gp"].values())
