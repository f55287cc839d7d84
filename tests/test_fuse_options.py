"""The arguments of fuse() and fusion_report() beyond the model: verification, and what is counted on an example."""

import copy
import json

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import fuse, fusion_report, modules

torchvision = pytest.importorskip("torchvision")


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 2, 1),
        nn.BatchNorm2d(2),
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_share_of_elements_is_that_of_an_example(device):
    model = fuse(network()).to(device)
    assert fusion_report(model).traffic is None
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    for inputs in (torch.randn(2, 3, 10, 10, device=device), (torch.randn(2, 3, 10, 10, device=device),)):
        report = fusion_report(model, device="cpu", example_inputs=inputs)
        assert [row.elements for row in report.rows] == [2 * 4 * 8 * 8, 2 * 8 * 3 * 3, 2 * 2 * 3 * 3]
        assert report.traffic == 512 / (512 + 144 + 36)
        assert (report.fused, report.alone) == (3, 2)
        assert "2 of them alone, 74.0% of the normalized elements with an add or a ReLU" in report.summary
        assert json.loads(report.to_json())["traffic"] == report.traffic
    assert [module.training for module in model.modules()] == modes
    if device == "cpu":
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert fusion_report(network(), example_inputs={"input": torch.randn(2, 3, 10, 10)}).traffic == 0


def test_what_cannot_run_on_the_meta_device_runs_where_it_is():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x) if x.sum().item() < 1e9 else x

    model = fuse(Reads())
    state = torch.random.get_rng_state()
    assert fusion_report(model, example_inputs=torch.randn(2, 3, 10, 10)).rows[0].elements == 512
    with pytest.raises(RuntimeError, match="expected input"):
        fusion_report(model, example_inputs=torch.randn(2, 5, 10, 10))
    torch.random.set_rng_state(state)


def test_verified_models_are_fused_and_nothing_else_changes():
    model = torchvision.models.resnet18(num_classes=10)
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert fuse(model, verify=True, example_inputs=torch.randn(4, 3, 64, 64)) is model
    assert fusion_report(model).fused == 20
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random) is False  # by randn here
    random = torch.random.get_rng_state()
    fuse(model, verify=True, recompute=True)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_model_that_differs_stays_unfused(monkeypatch):
    """An operator that is wrong by a part in ten thousand."""
    model = torchvision.models.resnet18(num_classes=10)
    original = modules.batch_norm_add_relu

    def wrong(bn, input, residual=None, relu=True):
        output = original(bn, input, residual, relu)
        return output * 1.0001 if bn.num_features == 128 and residual is not None else output

    monkeypatch.setattr(modules, "batch_norm_add_relu", wrong)
    with pytest.raises(resnet_fused.VerificationError, match=r"layer2\.1.*after fuse") as caught:
        fuse(model, verify=True)
    assert caught.value.module == "layer2.1"
    assert type(model) is torchvision.models.ResNet
    assert fusion_report(model).fused == 0
    fuse(model, verify=True, exclude="layer2.1")
    assert fusion_report(model).fused == 18


def test_excluded_parts_of_fused_blocks_run_as_they_are():
    """Not the block, but what its forward would have bypassed."""
    model = torchvision.models.resnet18(num_classes=10).double()
    reference = copy.deepcopy(model)
    fuse(model, exclude=["*.downsample", "layer1.0.bn1", "layer3"])
    rows = {row.name: row for row in fusion_report(model).rows}
    assert rows["layer2.0.downsample.1"].reason == "downsample was excluded from fuse()"
    assert rows["layer1.0.bn1"].reason == "bn1 was excluded from fuse()"
    assert rows["layer1.0.bn2"].operator == "batch_norm+add+relu"
    assert {name for name, row in rows.items() if not row.fused} >= {n for n in rows if n.startswith("layer3")}
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-9, atol=1e-10)
    copied = copy.deepcopy(model)
    assert [row.reason for row in fusion_report(copied).rows] == [row.reason for row in rows.values()]
    assert fusion_report(fuse(model)).fused == 20
    assert all(not hasattr(module, "_fusion_excluded") for module in model.modules())
    fuse(model, include="layer2")
    fused = {row.name for row in fusion_report(model).rows if row.fused}
    assert fused == {name for name in rows if name.startswith("layer2")}
    assert type(model) is torchvision.models.ResNet
