"""Coverage, shapes of what is drawn, and untouched global state."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import binom, norm

from probkit import plots
from probkit.errors import DataError, ShapeError


def axes():
    return plots.figure()[1][0, 0]


def test_coverage_of_a_calibrated_model_lies_in_the_binomial_band():
    n, levels = 4000, np.array([0.1, 0.5, 0.9])
    y = np.random.default_rng(0).normal(size=n)
    hits = plots.central_coverage(norm.cdf(y), levels) * n
    assert (np.abs(hits - n * levels) < 4 * np.sqrt(n * levels * (1 - levels))).all()


def test_coverage_of_a_narrow_model_falls_short():
    n, level = 4000, 0.9
    y = np.random.default_rng(0).normal(size=n)
    # intervals half as wide as they should be cover 2 Phi(z/2) - 1
    expected = 2 * norm.cdf(norm.ppf(0.95) / 2) - 1
    found = plots.central_coverage(norm.cdf(y, scale=0.5), [level])[0]
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_coverage_counts_the_edge():
    assert plots.central_coverage([0.25, 0.75], [0.5])[0] == 1.0


@pytest.mark.parametrize("bad", [[-0.1], [1.1], [np.nan], []])
def test_coverage_refuses_what_is_no_probability(bad):
    with pytest.raises(DataError, match="expected pit between 0 and 1"):
        plots.central_coverage(bad, [0.5])


def test_calibration_plot_draws_the_coverage_and_the_band():
    u = np.random.default_rng(1).uniform(size=200)
    levels = np.array([0.25, 0.5, 0.75])
    ax = plots.calibration_plot(axes(), {"model": u}, levels=levels)
    diagonal, curve = ax.lines
    np.testing.assert_allclose(curve.get_ydata(), plots.central_coverage(u, levels))
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    edge = ax.collections[0].get_paths()[0].vertices
    low = binom.ppf(0.025, 200, 0.5) / 200
    assert np.isclose(edge[np.isclose(edge[:, 0], 0.5), 1].min(), low)


def test_calibration_plot_needs_a_model():
    with pytest.raises(DataError, match="at least one model"):
        plots.calibration_plot(axes(), {})


def test_intervals_lie_where_they_should():
    ax = plots.interval_plot(
        axes(), ["a", "b"], [0, 1], [-1, 0.5], [1, 1.5], inner=([-0.5, 0.8], [0.5, 1.2])
    )
    thin, thick = (c.get_segments() for c in ax.collections)
    assert thin[1].tolist() == [[0.5, 1.0], [1.5, 1.0]]
    assert thick[0].tolist() == [[-0.5, 0.0], [0.5, 0.0]]
    assert ax.get_ylim() == (1.5, -0.5)  # first row on top


def test_wrong_length_names_the_dim():
    with pytest.raises(ShapeError, match=r"expected \[row\] = \[2\], got \[3\]"):
        plots.interval_plot(axes(), ["a", "b"], [0, 1, 2], [0, 0], [1, 1])
    with pytest.raises(ShapeError, match=r"expected draws \[chain, draw\], got \[4\]"):
        plots.trace_plot(axes(), np.zeros(4))


def test_density_integrates_to_one_and_exact_is_dashed():
    draws = np.random.default_rng(2).normal(size=2000)
    x = np.linspace(-3, 3, 50)
    ax = plots.density_plot(axes(), {"draws": draws}, log_density={"exact": (x, norm.logpdf(x))})
    estimate, exact = ax.lines
    assert abs(np.trapezoid(estimate.get_ydata(), estimate.get_xdata()) - 1) < 0.01
    assert exact.get_linestyle() == "--"
    np.testing.assert_allclose(exact.get_ydata(), norm.pdf(x))


@pytest.mark.parametrize("bad", [[1.0], [1.0, 1.0], [1.0, np.inf]])
def test_density_refuses_draws_without_a_density(bad):
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(DataError, match="at least two different finite draws of 'mu'"),
    ):
        plots.density_plot(axes(), {"mu": bad})


def test_band_sorts_its_inputs():
    x = np.array([2.0, 0.0, 1.0])
    ax = plots.band_plot(axes(), x, 10 * x, [(x - 1, x + 1)])
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert ax.lines[0].get_ydata().tolist() == [0, 10, 20]


def test_style_ends_with_its_block():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert dict(matplotlib.rcParams) == before


def test_nothing_imports_pyplot():
    code = (
        "import sys; from probkit import plots\n"
        "fig, axes = plots.figure(); plots.trace_plot(axes[0, 0], [[0.0, 1.0]])\n"
        "import io; fig.savefig(io.BytesIO(), format='png')\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
