"""A language model on a CUDA device draws and scores as on the CPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from support.tiny_lm import save_tiny_model

from probkit.models.language import Law, TransformersLM
from probkit.models.language.protocol import extended

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_forked_particles(folder):
    texts, tables = [], []
    for device in ("cpu", "cuda"):
        lm = TransformersLM(folder, device=device, dtype=torch.float64)
        prefixes, rng = [lm.start("hello: ab")] * 6, torch.Generator().manual_seed(0)
        for law in (Law(), Law(temperature=0.7, top_p=0.9)):
            steps = lm.generate(prefixes, stop=["a"], max_tokens=8, law=law, rng=rng)
            prefixes = [extended(prefixes[k], steps[k]) for k in (0, 0, 2, 3, 3, 5)]
        texts.append([prefix.text for prefix in prefixes])
        tables.append(lm.next_log_probs(prefixes))
        assert tables[-1].device.type == "cpu"
    assert texts[0] == texts[1]
    torch.testing.assert_close(*tables, rtol=1e-9, atol=1e-9)
