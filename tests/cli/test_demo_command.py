"""The command line, with real views registered for the test."""

from __future__ import annotations

import re
import warnings

# Their imports draw from the random stream (rich) and add warning filters (arviz); done here so
# that no test is charged with it.
import arviz as az
import numpy as np
import pandas as pd
import pytest
import rich.console  # noqa: F401
import torch
from typer.testing import CliRunner

from probkit import plots
from probkit._version import __version__
from probkit.cli import app
from probkit.demo import DemoView, Registry, runner


def conjugate_mean(ctx):
    """Posterior of a normal mean, known variance: a table, a picture and an ArviZ file."""
    generator = torch.Generator().manual_seed(ctx.rng_seed)
    y = torch.randn(50, generator=generator, dtype=torch.float64) + 2.0
    variance = 1 / (1 / 100 + len(y))
    mean = variance * float(y.sum())
    draws = mean + variance**0.5 * torch.randn(2, 400, generator=generator, dtype=torch.float64)
    ctx.text("The posterior of a **mean** with `known` variance.\n\n<script>alert(1)</script>")
    ctx.table(pd.DataFrame({"site": ["mu"], "mean": [mean], "draws": [800]}), "Posterior")
    fig, axes = plots.figure()
    plots.density_plot(axes[0, 0], {"mu": draws})
    ctx.figure(fig, "density", "Density of mu <b>")
    ctx.arviz(az.from_dict(posterior={"mu": draws.numpy()}))
    ctx.note("full form" if ctx.full else "short form")


def failing(ctx):
    ctx.text("Shown before the failure.")
    raise ValueError("no [such] number")


@pytest.fixture
def registry(monkeypatch):
    registry = Registry()
    monkeypatch.setattr("probkit.demo.registry.REGISTRY", registry)
    monkeypatch.setattr("probkit.demo.registry.SEARCHED", ())
    monkeypatch.setattr("probkit.demo.discover", lambda: registry)
    return registry


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_version():
    result = call("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, f"probkit {__version__}")


def test_info_names_the_versions():
    result = call("info")
    assert result.exit_code == 0
    assert re.search(rf"^torch +{re.escape(torch.__version__)}", result.stdout, re.M)


def test_lists_families_and_views(registry):
    registry.add(DemoView("toy", "Second", failing, order=2))
    registry.add(DemoView("toy", "First", conjugate_mean, order=1))
    for arguments in ((), ("demo", "--list")):
        result = call(*arguments)
        assert result.exit_code == 0
        assert result.stdout.index("First") < result.stdout.index("Second")
        assert "probkit demo toy" in result.stdout


def test_report_holds_what_the_view_showed(registry, tmp_path):
    registry.add(DemoView("toy", "A conjugate mean", conjugate_mean))
    result = call("demo", "toy", "--out", tmp_path, "--seed", 3)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    assert 'id="toy-a-conjugate-mean"' in page
    assert "<strong>mean</strong>" in page and "<code>known</code>" in page
    assert "<script>" not in page and "Density of mu &lt;b&gt;" in page
    assert '<td class="number">800</td>' in page
    assert "short form" in page and "seed 3" in page
    assert f"<td>{__version__}</td>" in page
    # pictures travel inside the page, and lie beside it
    assert "data:image/png;base64," in page and 'src="toy' not in page
    assert (tmp_path / "toy-a-conjugate-mean-density.png").read_bytes()[:4] == b"\x89PNG"


def test_arviz_file_reads_back(registry, tmp_path):
    registry.add(DemoView("toy", "A conjugate mean", conjugate_mean))
    assert call("demo", "--out", tmp_path, "--full").exit_code == 0
    with warnings.catch_warnings():  # xarray adds a filter while it reads
        posterior = az.from_netcdf(tmp_path / "toy-a-conjugate-mean-posterior.nc").posterior
    # 50 observations around 2: the mean of the draws is within 5 standard errors of 2
    assert posterior["mu"].shape == (2, 400)
    assert abs(float(posterior["mu"].mean()) - 2.0) < 5 / np.sqrt(50)
    assert "full form" in (tmp_path / "report.html").read_text()


def test_seed_reaches_the_view(registry, tmp_path):
    registry.add(DemoView("toy", "A conjugate mean", conjugate_mean))

    def mean(seed, folder):
        assert call("demo", "--seed", seed, "--out", tmp_path / folder).exit_code == 0
        page = (tmp_path / folder / "report.html").read_text()
        return re.search(r'<td>mu</td><td class="number">([^<]+)</td>', page)[1]

    assert mean(1, "a") == mean(1, "b") != mean(2, "c")


def test_failing_view_is_shown_and_does_not_stop_the_others(registry, tmp_path):
    registry.add(DemoView("toy", "Breaks", failing, order=1))
    registry.add(DemoView("toy", "Works", conjugate_mean, order=2))
    result = call("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "failed: ValueError: no [such] number" in result.stdout
    page = (tmp_path / "report.html").read_text()
    assert "ValueError: no [such] number" in page
    assert "Shown before the failure." in page and "Density of mu" in page
    assert "1 failed" in page
    assert str(tmp_path) not in page and "/site-packages/" not in page


def test_interruption_keeps_the_finished_views(registry, tmp_path):
    def interrupted(ctx):
        raise KeyboardInterrupt

    registry.add(DemoView("toy", "Works", conjugate_mean, order=1))
    registry.add(DemoView("toy", "Stopped", interrupted, order=2))
    registry.add(DemoView("toy", "Never run", failing, order=3))
    assert call("demo", "--out", tmp_path).exit_code == 130
    page = (tmp_path / "report.html").read_text()
    assert "Density of mu" in page and "Never run" not in page


def test_view_over_budget_is_flagged_and_passes(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "BUDGET", 0.0)
    registry.add(DemoView("toy", "Slow", lambda ctx: ctx.text("done")))
    result = call("demo", "--out", tmp_path)
    assert result.exit_code == 0
    assert "over its budget of 0 s" in result.stdout
    assert "over its budget of 0 s" in (tmp_path / "report.html").read_text()
    assert "over its" not in call("demo", "--full", "--out", tmp_path).stdout


def test_unknown_family_is_one_line(registry):
    registry.add(DemoView("toy", "Works", conjugate_mean))
    result = call("demo", "tyo")
    assert result.exit_code == 2
    assert "expected families with a demo (toy), got tyo" in result.stderr


def test_without_views_says_so(registry, tmp_path):
    result = call("demo", "--out", tmp_path)
    assert result.exit_code == 1 and "There is no view yet" in result.stdout
