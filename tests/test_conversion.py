"""fuse(), unfuse() and fusion_report() on every ResNet, ResNeXt and Wide ResNet of torchvision."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused
from resnet_fused import FusedResidualBlock, fuse, fusion_report, unfuse

torchvision = pytest.importorskip("torchvision")
resnet = torchvision.models.resnet

MODELS = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if name.startswith(("resnet", "resnext", "wide_resnet"))
]
LAYERS = ("layer1", "layer2", "layer3", "layer4")
# Those that differ once with_every_kind_of_block() has cut them: resnet34, resnet101, resnet152 and wide_resnet101_2
# repeat the blocks of these. Three steps of all of them in full would take minutes.
DISTINCT = ["resnet18", "resnet50", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2"]


pytestmark = pytest.mark.usefixtures("one_thread")


def on_meta(name):
    with torch.device("meta"):
        return torchvision.models.get_model(name, num_classes=10)


def with_every_kind_of_block(name):
    """A model of torchvision in float64, each layer cut to its first block, layer1 and layer2 to two.

    The first has a projection shortcut where the layer has one, the second has none, and all others repeat it.
    """
    model = on_meta(name)
    for layer, blocks in zip(LAYERS, (2, 2, 1, 1), strict=True):
        setattr(model, layer, getattr(model, layer)[:blocks])
    model = model.double().to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return model


def three_steps(model, x, target):
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_all_constructors_are_tested():
    assert len(MODELS) >= 10
    assert set(DISTINCT) < set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_every_block_of_a_model_is_fused(name):
    """Structure only: the full model, on the meta device."""
    model = on_meta(name)
    state, parameters, text = list(model.state_dict()), list(model.parameters()), str(model)
    classes = [type(m) for m in model.modules()]
    assert fuse(model) is model
    report = fusion_report(model, device="cpu")
    bns = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [row.name for row in report.rows] == bns
    assert report.fused == report.total == len(bns)
    for row in report.rows:
        if ".downsample." in row.name:
            assert row.operator == "batch_norm+batch_norm+add+relu"
    assert list(model.state_dict()) == state
    assert all(mine is before for mine, before in zip(model.parameters(), parameters, strict=True))
    assert str(model) == text
    for module, cls in zip(model.modules(), classes, strict=True):
        fused = cls in (resnet.ResNet, resnet.BasicBlock, resnet.Bottleneck)
        assert isinstance(module, cls)
        assert (type(module) is cls) != fused
    again = [type(m) for m in model.modules()]
    assert [type(m) for m in fuse(model).modules()] == again
    assert unfuse(model) is model
    assert [type(m) for m in unfuse(model).modules()] == classes
    assert all(mine is before for mine, before in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("name", DISTINCT)
def test_evaluation_and_training_are_the_same(name):
    # Both run in float64, where one rounding is 1.1e-16; normalization of at least 16 values and three steps let it
    # grow by
    # a few orders. An error of the formulas would be larger than 1/9216, the inverse of the values a channel has at
    # most.
    tolerance = {"rtol": 1e-9, "atol": 1e-10}
    reference = with_every_kind_of_block(name)
    model = fuse(copy.deepcopy(reference))
    x, target = torch.randn(4, 3, 48, 48, dtype=torch.float64), torch.arange(4)
    torch.testing.assert_close(three_steps(model, x, target), three_steps(reference, x, target), **tolerance)
    for (key, mine), its in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, its, **tolerance, msg=lambda m, key=key: f"{key}: {m}")

    # Weights go both ways.
    state = copy.deepcopy(reference.state_dict())
    reference.load_state_dict(model.state_dict())
    model.load_state_dict(state)
    model.eval()
    reference.eval()
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(model(x), expected, **tolerance)
        assert torch.equal(unfuse(model)(x), reference.load_state_dict(state) and reference(x))


def test_a_deep_model_trains_the_same():
    reference = torchvision.models.resnet50(num_classes=10, zero_init_residual=True).double()
    model = fuse(copy.deepcopy(reference))
    x, target = torch.randn(4, 3, 48, 48, dtype=torch.float64), torch.arange(4)
    for a in (model, reference):
        F.cross_entropy(a(x), target).backward()
    for (name, mine), its in zip(model.named_parameters(), reference.parameters(), strict=True):
        # 16 blocks; the weights of a residual branch whose last BatchNorm is zero have zero gradients.
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_float32_is_as_close_to_float64_as_eager(name):
    """Rounding errors of two float32 runs are draws from one distribution: their norms differ by a small factor."""
    exact = with_every_kind_of_block(name)
    eager = copy.deepcopy(exact).float()
    fused = fuse(copy.deepcopy(eager))
    x, target = torch.randn(8, 3, 48, 48), torch.arange(8)
    outputs = [model(x.to(next(model.parameters()).dtype)) for model in (exact, eager, fused)]
    gradients = []
    for model, output in zip((exact, eager, fused), outputs, strict=True):
        F.cross_entropy(output, target).backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    for truth, its, mine in (outputs, gradients):
        assert (mine.double() - truth).norm() <= 2 * (its.double() - truth).norm()


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_stays(channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = torchvision.models.resnet18(num_classes=10).to(memory_format=memory_format)
    formats = {}
    for name, layer in fuse(model).named_children():
        layer.register_forward_hook(lambda m, i, output, name=name: formats.setdefault(name, output))
    model(torch.randn(2, 3, 64, 64).contiguous(memory_format=memory_format))
    for name in LAYERS[:3]:
        assert formats[name].is_contiguous(memory_format=memory_format), name


class Child(resnet.BasicBlock):
    """A subclass, whose forward could be anything."""

    def forward(self, x):
        return super().forward(x) + 1


def test_subclasses_are_left_alone():
    model = resnet.ResNet(Child, [1, 1, 1, 1], num_classes=10)
    fuse(model)
    assert type(model.layer1[0]) is Child
    report = fusion_report(model)
    assert report.fused == 1  # the stem
    assert "no forward that is read calls it" in report.rows[1].reason  # but one that super() stands for


def test_another_torchvision(monkeypatch):
    """A release of torchvision whose block computes something else: its own source is what is rewritten."""

    def forward(self, x):
        out = F.leaky_relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))

    monkeypatch.setattr(resnet.BasicBlock, "forward", forward)
    reference = torchvision.models.resnet18(num_classes=10).double()
    model = fuse(copy.deepcopy(reference))
    report = fusion_report(model)
    assert report.rows[1].operator == "batch_norm"
    assert report.rows[2].operator == "batch_norm+relu"
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-9, atol=1e-10)
    monkeypatch.undo()
    assert fusion_report(fuse(torchvision.models.resnet18(num_classes=10))).rows[2].operator == "batch_norm+add+relu"


def test_a_forward_replaced_on_the_instance_is_left_alone():
    model = torchvision.models.resnet18(num_classes=10)
    model.layer1[0].forward = model.layer1[0].forward
    fuse(model)
    assert type(model.layer1[0]) is resnet.BasicBlock
    assert "replaced on the instance" in fusion_report(model).rows[1].reason


def test_report_before_and_after():
    model = torchvision.models.resnet18(num_classes=10)
    report = fusion_report(model)
    assert (report.fused, report.total) == (0, 20)
    assert {row.reason for row in report.rows} == {"fuse() has not been applied"}
    assert report.rows[0].operator == "batch_norm+relu"
    report = fusion_report(fuse(model))
    assert (report.fused, report.total) == (20, 20)
    assert str(report).endswith("20 of 20 BatchNorms fused")
    data = json.loads(report.to_json())
    assert data["fused"] == 20
    assert data["rows"][0] == {
        "name": "bn1",
        "module": "BatchNorm2d",
        "fused": True,
        "operator": "batch_norm+relu",
        "reason": None,
        "backend": "compiled",
        "recompute": False,
        "elements": None,
    }
    with torch.no_grad(), pytest.raises(TypeError, match="got NoneType"):
        fusion_report(None)


def test_report_shows_a_fallback():
    model = fuse(torchvision.models.resnet18(num_classes=10))
    with resnet_fused.backend("reference"):
        report = fusion_report(model)
    assert report.fused == 0
    assert {row.backend for row in report.rows} == {"reference"}
    assert "'reference' was asked for" in report.summary
    report = fusion_report(model.to("meta"))
    assert report.fused == 0
    assert "meta" in report.summary
    assert fusion_report(model, device="cpu").fused == 20


def test_report_of_own_blocks_and_strangers():
    model = nn.Sequential(
        FusedResidualBlock(4, 8),
        FusedResidualBlock(8, 4, bn2_before_conv2=True),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        torchvision.ops.FrozenBatchNorm2d(4),
        nn.BatchNorm1d(4),
    )
    rows = {row.name: row for row in fusion_report(fuse(model)).rows}
    operators = {name: row.operator for name, row in rows.items() if row.fused}
    assert operators == {
        "0.bn1": "batch_norm+relu",
        "0.bn2": "batch_norm+batch_norm+add+relu",
        "0.shortcut.1": "batch_norm+batch_norm+add+relu",
        "1.bn1": "batch_norm+relu",
        "1.bn2": "batch_norm",
        "1.shortcut.1": "batch_norm+add+relu",
        "2.0": "batch_norm+relu",
    }
    assert {name for name, row in rows.items() if not row.fused} == {"3", "4"}
    model[0].bn2.register_forward_hook(lambda *_: None)
    rows = {row.name: row for row in fusion_report(model).rows}
    assert (rows["0.bn2"].operator, rows["0.bn2"].fused) == ("batch_norm+add+relu", True)
    assert rows["0.shortcut.1"].reason == "bn2 has a forward hook"
    nn.SyncBatchNorm.convert_sync_batchnorm(model[0])
    rows = {row.name: row for row in fusion_report(model).rows}
    assert rows["0.bn1"].reason == "bn1 is a SyncBatchNorm, not a BatchNormAddReLU2d"
    assert str(fusion_report(nn.ReLU())) == "0 of 0 BatchNorms fused"


def test_what_is_refused():
    model = torchvision.models.resnet18(num_classes=10)
    with pytest.raises(TypeError, match="got list"):
        fuse([model])
    with pytest.raises(TypeError, match="got list"):
        unfuse([model])
    with pytest.raises(TypeError, match="ScriptModule"):
        fuse(torch.jit.script(nn.ReLU()))
    with pytest.raises(TypeError, match="compiled already"):
        fuse(torch.compile(model))
    model.layer1[0].compile()
    with pytest.raises(TypeError, match=r"layer1\.0 is compiled already"):
        fuse(model)
    assert type(model) is resnet.ResNet


def test_unfuse_refuses_a_class_changed_again():
    model = fuse(torchvision.models.resnet18(num_classes=10))
    block = model.layer1[0]
    block.__class__ = type("Wrapped", (type(block),), {})
    with pytest.raises(TypeError, match=r"layer1\.0 was changed to Wrapped"):
        unfuse(model)
    assert type(model) is not resnet.ResNet
