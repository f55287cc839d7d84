"""tools/model_check.py sees a difference where there is one, and tools/model_table.py writes what was found."""

import importlib
import math
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
# It tests the tools, which no wheel has.
if not (ROOT / "tools").is_dir():
    pytest.skip("needs the checkout", allow_module_level=True)
pytest.importorskip("torchvision")
sys.path.insert(0, str(ROOT / "tools"))
model_list = importlib.import_module("model_list")
model_check = importlib.import_module("model_check")
model_table = importlib.import_module("model_table")

SOURCE = """
from torch import nn
from torchvision.models.resnet import BasicBlock
def build(**arguments):
    return nn.Sequential(nn.Conv2d(3, 4, 3), BasicBlock(4, 4), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Sigmoid())
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "tiny_model.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    dtype = torch.get_default_dtype()
    yield model_list.Model("tiny_model:build", size=8)
    torch.set_default_dtype(dtype)


def test_a_fused_model_holds(model):
    result = model_check.check(model)
    assert 2 <= result.fused <= result.total == 3
    assert sum(count for _, count in result.reasons) == result.total - result.fused
    assert 0 < result.train.gradient < 1e-12
    assert model_table._holds(result)


def _weight(fused):
    next(fused.parameters()).data.mul_(1 + 1e-6)


def _eps(fused):
    fused[1].bn1.eps *= 1.01


def _momentum(fused):
    fused[1].bn2.momentum *= 1 + 1e-6


def _frozen(fused):
    fused[1].bn2.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [_weight, _eps, _momentum, _frozen])
def test_a_difference_is_seen(model, monkeypatch, change):
    fuse = model_check.fuse

    def mistaken(network):
        change(fuse(network))
        return network

    monkeypatch.setattr(model_check, "fuse", mistaken)
    result = model_check.check(model)
    assert not model_table._holds(result)


def test_statistics_alone_are_seen(model, monkeypatch):
    fuse = model_check.fuse

    def mistaken(network):
        _momentum(fuse(network))
        return network

    monkeypatch.setattr(model_check, "fuse", mistaken)
    train = model_check.check(model).train
    assert train.statistics > model_table.BOUND > max(train.output, train.gradient)


def test_what_is_no_number_does_not_hold():
    good = model_check.Errors(0.0, 0.0, 0.0)
    bad = model_check.Errors(0.0, math.nan, 0.0)
    assert bad.largest == math.inf
    assert model_table._holds(model_check.Result("", 1, 0, 1, (), good, good))
    assert not model_table._holds(model_check.Result("", 1, 0, 1, (), good, bad))
    assert not model_table._holds("RuntimeError: it failed")


def test_page_has_counts_reasons_and_failures():
    for package in model_list.PACKAGES:
        pytest.importorskip(model_table.SOURCES[package].module)
    errors = model_check.Errors(1e-15, 2e-8, 0.0)
    reasons = (("a|b", 3), ("second", 2), ("third", 1), ("fourth", 1), ("fifth", 1))
    results = {
        "resnet18": model_check.Result("resnet18", 2, 1, 10, reasons, errors, errors),
        "resnet34": "its process was killed",
    }
    lines = model_table.page(results, 60).splitlines()
    row = next(line for line in lines if "`resnet18`" in line)
    why = "3: a\\|b; 2: second; 1: third; 2: 2 other reasons"
    assert row == f"| `resnet18` | 10 | 2 | 1 | 8 | 1e-15 | **2.0e-08** | 1e-15 | **2.0e-08** | 0 | {why} |"
    assert any("FAILED: its process was killed" in line for line in lines)


def test_titles_are_different():
    titles = [model.title for model in model_list.MODELS]
    assert len(set(titles)) == len(titles) >= 70
