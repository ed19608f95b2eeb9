"""The callback inside real Lightning trainings on the CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning's imports announce
    import lightning as L
    from lightning.fabric.utilities.warnings import PossibleUserWarning

from probkit.errors import DataError
from probkit.models.pfn.lightning_callback import LightningCallback
from probkit.models.pfn.normalizer import CurveNormalizer

pytestmark = pytest.mark.filterwarnings(
    # loaders of 60 rows need no workers
    f"ignore::{PossibleUserWarning.__module__}.{PossibleUserWarning.__qualname__}",
    "ignore:.*LeafSpec.*:FutureWarning",
)

ACC = CurveNormalizer.accuracy()


class Classifier(L.LightningModule):
    """A linear classifier that logs its accuracy."""

    def __init__(self, lr=0.1, log=True, diverge_at=None):
        super().__init__()
        self.layer = nn.utils.skip_init(nn.Linear, 4, 2)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.lr, self.log_it, self.diverge_at = lr, log, diverge_at

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.layer(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        value = (self.layer(x).argmax(1) == y).float().mean()
        if self.diverge_at is not None and self.current_epoch + 1 >= self.diverge_at:
            value = value * float("nan")
        if self.log_it:
            self.log("val_acc", value)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loaders(noise):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(240, 4, generator=g)
    y = (x[:, 0] > 0).long()
    y = torch.where(torch.rand(240, generator=g) < noise, 1 - y, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=60, generator=g)
    return loader, DataLoader(TensorDataset(x, y), batch_size=240, generator=g)


def fit(callback, *, noise=0.4, epochs=30, folder=None, module=None, **options):
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module or Classifier(), *loaders(noise))
    return trainer


def test_a_hopeless_training_is_stopped(lc, tmp_path):
    callback = LightningCallback("val_acc", ACC, best=0.97, model=lc)
    trainer = fit(callback, folder=tmp_path)
    assert callback.watch.stopped_at is not None
    assert trainer.current_epoch == callback.watch.stopped_at < 20
    assert len(callback.watch.values) == trainer.current_epoch


def test_a_training_that_leads_goes_on_while_it_may_improve(lc, tmp_path):
    callback = LightningCallback("val_acc", ACC, best=0.4, model=lc, delta=0.0001)
    trainer = fit(callback, noise=0.0, epochs=6, folder=tmp_path, module=Classifier(lr=0.003))
    assert trainer.current_epoch == 6 and callback.watch.stopped_at is None


def test_a_metric_that_becomes_nan_stops_the_training(lc, tmp_path):
    callback = LightningCallback("val_acc", ACC, model=lc)
    trainer = fit(callback, folder=tmp_path, module=Classifier(diverge_at=3))
    assert trainer.current_epoch == 3 == callback.watch.stopped_at


def test_the_record_is_part_of_the_checkpoint(lc, tmp_path):
    callback = LightningCallback("val_acc", ACC, model=lc, check=[29], horizon=30)
    trainer = fit(callback, epochs=4, folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    later = LightningCallback("val_acc", ACC, model=lc, check=[29], horizon=30)
    more = L.Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[later],
    )  # fmt: skip
    more.fit(Classifier(), *loaders(0.4), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert later.watch.steps == [1, 2, 3, 4, 5, 6]
    assert later.watch.values[:4] == callback.watch.values


def test_it_is_a_callback_of_lightning(lc):
    callback = LightningCallback("val_acc", ACC, model=lc)
    assert isinstance(callback, L.Callback) and isinstance(callback, LightningCallback)
    twin = copy.deepcopy(LightningCallback("val_acc", ACC))
    assert isinstance(twin, L.Callback) and twin.monitor == "val_acc"


def test_bad_input(lc, tmp_path):
    with pytest.raises(DataError, match="delta: expected a probability"):
        LightningCallback("val_acc", ACC, delta=1.0)
    with pytest.raises(DataError, match="expected the metric 'val_acc' to be logged, found none"):
        fit(
            LightningCallback("val_acc", ACC, model=lc),
            folder=tmp_path,
            module=Classifier(log=False),
        )
    with pytest.raises(DataError, match=r"expected horizon=.* or a trainer with max_epochs >= 2"):
        fit(LightningCallback("val_acc", ACC, model=lc), epochs=1, folder=tmp_path)
