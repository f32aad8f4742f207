"""Clinical metrics with a stand-in for RadEval, and without it."""

import types

import numpy as np
import pytest

from radfm_jax.evaluate import (
    clinical,
)


class FakeRadEval:
    """A stand-in with the signature of radeval 2.2."""

    def __init__(self, metrics=None, show_progress=True):
        (self.metric,) = metrics
        assert not show_progress
        if self.metric == "green":
            raise ValueError("Unknown metric 'green'")

    def __call__(self, refs, hyps):
        if self.metric == "f1chexbert":
            raise OSError("no network")
        return {"radgraph_simple": np.mean([r == h for r, h in zip(refs, hyps, strict=True)]), "details": []}


def test_clinical_metrics_by_a_fake(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "radeval", types.SimpleNamespace(RadEval=FakeRadEval))
    assert clinical.clinical("radgraph", ["a", "b"], ["a", "c"]) == {"radgraph_simple": 0.5}
    with pytest.raises(clinical.Unavailable, match="OSError: no network.*weights"):
        clinical.clinical("chexbert", ["a"], ["a"])
    with pytest.raises(clinical.Unavailable, match="Unknown metric 'green'"):
        clinical.clinical("green", ["a"], ["a"])


def test_clinical_metrics_without_the_package():
    with pytest.raises(clinical.Unavailable, match="pip install radeval"):
        clinical.clinical("radgraph", ["a"], ["a"])
    with pytest.raises(ValueError, match="unknown clinical metrics radgrap"):
        clinical.check(["radgrap"])
