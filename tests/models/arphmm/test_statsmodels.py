"""US real GDP growth: the likelihood and the state laws of statsmodels, at its own estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probkit.models.arphmm import ARPHMM

sm = pytest.importorskip("statsmodels.api")


def test_markov_regression_on_its_own_lags_is_this_model():
    gdp = sm.datasets.macrodata.load_pandas().data["realgdp"].to_numpy()
    y = 100 * np.diff(np.log(gdp))
    lags = np.column_stack([y[1:-1], y[:-2]])
    peer = sm.tsa.MarkovRegression(y[2:], k_regimes=2, exog=lags, switching_variance=True)
    fit = peer.fit(search_reps=0, disp=False)
    names = dict(zip(peer.param_names, fit.params, strict=True))
    weights = [[[names[f"const[{k}]"], names[f"x1[{k}]"], names[f"x2[{k}]"]]] for k in (0, 1)]
    stay, back = names["p[0->0]"], names["p[1->0]"]
    stationary = np.array([back, 1 - stay]) / (back + 1 - stay)
    values = {
        "initial": torch.as_tensor(stationary),
        "transition": torch.tensor([[stay, 1 - stay], [back, 1 - back]], dtype=torch.float64),
        "weights": torch.tensor(weights, dtype=torch.float64),
        "covariance": torch.tensor(
            [[[names["sigma2[0]"]]], [[names["sigma2[1]"]]]], dtype=torch.float64
        ),
    }
    model = ARPHMM(2, 2, prior=None)
    assert abs(float(model.log_likelihood(values, y)) - fit.llf) < 1e-9
    smoothed = model.smooth(values, y).smoothed[0].numpy()
    assert np.abs(smoothed - fit.smoothed_marginal_probabilities).max() < 1e-9
    filtered = model.filter(values, y).filtered[0].numpy()
    assert np.abs(filtered - fit.filtered_marginal_probabilities).max() < 1e-9
