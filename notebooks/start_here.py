# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Start here
#
# probkit has one sentence: *a model states what it can do, a guide proposes latents, a sampler
# turns model, guide and data into a posterior, and a posterior predicts.* This tutorial walks
# through it twice: with a native model on the diabetes data, and with a Pyro program on the eight
# schools.

# %%
# %matplotlib inline

# %%
import torch

import probkit as pk
from probkit.datasets import diabetes, eight_schools
from probkit.inference import MAP, SVI, Direct, Fixed, ImportanceSampling, MeanField
from probkit.kernels import NNGPKernel
from probkit.models import InverseGamma, PointMass, ScaleMixtureNNGP

# %% [markdown]
# ## A model, and what it was given
#
# `diabetes()` gives 442 patients with ten measurements each. We keep thirty to learn from: a
# small sample is where the tails of a predictive distribution matter. Frames go in as they are.

# %%
x, y, x_test, y_test = next(diabetes().splits(1, train=30, seed=3))
x.head(3)

# %% [markdown]
# `ScaleMixtureNNGP` is an infinitely wide Bayesian network whose output scale is unknown. An
# inverse gamma law of the squared scale makes it a Student-t process. `Direct` conditions in
# closed form, and `hyper=MAP()` first finds the kernel's hyper-parameters by marginal likelihood.
# Randomness is always explicit: `rng=` is an integer or a `torch.Generator`, and your global
# random state is left alone.

# %%
model = ScaleMixtureNNGP(NNGPKernel(depth=2), scale=InverseGamma(2.0, 2.0), standardize=True)
post = pk.infer(model, (x, y), Direct(hyper=MAP(restarts=1)), rng=0)
post.summary()

# %% [markdown]
# ## A posterior predicts
#
# `predict` returns a distribution, whatever the model: `mean`, `variance`, `quantile`, `cdf`,
# `log_prob` and `sample`. The default is a new observation, noise included; `site="f"` is the
# latent function.

# %%
prediction = post.predict(x_test)
low, high = prediction.quantile([0.05, 0.95])
target = torch.tensor(y_test.to_numpy())
rmse = float((prediction.mean - target).square().mean().sqrt())
nll = float(-prediction.log_prob(target).mean())
coverage = float(((target >= low) & (target <= high)).double().mean())
print(f"RMSE {rmse:.1f}, NLL {nll:.3f}, 90 % intervals hold {coverage:.0%} of the test patients")

# %% [markdown]
# Is the heavy tail worth it? Give the same network a fixed scale (a point mass: the plain
# Gaussian process) and compare. With thirty patients the scale is uncertain, and the mixture says
# so.

# %%
plain = pk.infer(
    ScaleMixtureNNGP(NNGPKernel(depth=2), scale=PointMass(1.0), standardize=True),
    (x, y),
    Direct(hyper=MAP(restarts=1)),
    rng=0,
)
plain_nll = float(-plain.predict(x_test).log_prob(target).mean())
print(f"NLL: mixture {nll:.3f}, plain {plain_nll:.3f}")

# %%
from probkit import plots

fig, axes = plots.figure(1, 2, size=(10, 4.4))
shown = slice(0, 15)
q = prediction.quantile([0.025, 0.25, 0.75, 0.975])[:, shown]
plots.interval_plot(
    axes[0, 0],
    [f"patient {i}" for i in x_test.index[shown]],
    prediction.mean[shown],
    q[0],
    q[3],
    inner=(q[1], q[2]),
)
axes[0, 0].plot(y_test.iloc[shown], range(15), "kx")
axes[0, 0].set_xlabel("disease progression: 50 % and 95 % intervals, observed (x)")
pits = {"mixture": prediction.cdf(target), "plain": plain.predict(x_test).cdf(target)}
plots.calibration_plot(axes[0, 1], pits)
fig

# %% [markdown]
# ## A Pyro program is a model, too
#
# The eight schools, written for Pyro without any change. `observed` names the arguments that are
# `None` when predicting. The school names in the pandas index become coordinates.

# %%
import pyro
import pyro.distributions as dist


def schools(standard_error, effect=None):
    zero = torch.zeros((), dtype=torch.float64)
    mean = pyro.sample("mean", dist.Normal(zero, 20.0))
    spread = pyro.sample("spread", dist.HalfCauchy(zero + 10.0))
    with pyro.plate("school", len(standard_error)):
        offset = pyro.sample("offset", dist.Normal(zero, 1.0))
        pyro.sample("effect", dist.Normal(mean + spread * offset, standard_error), obs=effect)


frame = eight_schools()
data = {"standard_error": frame["standard_error"], "effect": frame["effect"]}
program = pk.FromPyro(schools, observed=("effect",))
fit = pk.infer(program, data, SVI(steps=1500), guide=MeanField(), rng=0)
fit.log_evidence

# %% [markdown]
# A variational fit is a bound, not the truth. Using it as the proposal of an importance sampler
# corrects it and measures how good it was: the effective sample size says how many of the 4000
# draws count.

# %%
checked = pk.infer(
    program,
    data,
    ImportanceSampling(4000),
    guide=Fixed(fit.source.guide, fit.source.params[0]),
    rng=0,
)
ess = checked.attrs["ess"]
bound = float(fit.log_evidence.value)
evidence = float(checked.log_evidence.value)
print(f"bound {bound:.3f} <= evidence {evidence:.3f}; {ess:.0f} effective draws of 4000")

# %%
checked.summary()

# %% [markdown]
# ## Keep it
#
# A posterior is saved as JSON and safetensors, without pickle. A Pyro program is code, so it is
# not in the file: pass it to `load` again. ArviZ reads `to_arviz()`.

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    post.save(folder)
    again = pk.load(folder)
same = bool(torch.equal(again.predict(x_test).mean, prediction.mean))
same

# %% [markdown]
# ## What can go wrong
#
# A sampler that does not fit a model is refused before any work, with the names of those that
# would.

# %%
try:
    pk.infer(program, data, Direct(), rng=0)
except pk.CapabilityError as error:
    message = str(error)
message

# %% [markdown]
# Bad data are named by row and column.

# %%
broken = x.copy()
broken.iloc[4, 2] = float("nan")
try:
    pk.infer(model, (broken, y), rng=0)
except pk.DataError as error:
    complaint = str(error)
complaint
