"""fuse() on residual blocks of other classes: known shapes are fused, near misses are refused with the reason."""

import copy
import pickle
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused import fuse, fusion_report, unfuse

# As in test_modules.py: float64 on both sides, sums of at most 4 * 9 * 9 terms.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}


class Base(nn.Module):
    """The parts of a block; forwards differ."""

    def __init__(self, in_channels=8, out_channels=8, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class Paper(Base):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ReLUModules(Base):
    def forward(self, x):
        residual = self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(torch.add(residual, out))


class Methods(Base):
    def forward(self, input):
        out = self.bn1(self.conv1(input)).relu_()
        return self.bn2(self.conv2(out)).add_(self.shortcut(input)).relu()


class Branching(Base):
    def forward(self, x):
        identity = x
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if len(self.shortcut) > 0:
            identity = self.shortcut(x)
        return torch.relu_(out + identity)


class Tutorial(Base):
    def forward(self, x):
        residual = self.shortcut(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.conv2(self.bn2(x))
        x += residual
        return self.relu(x)


class OtherNames(nn.Module):
    def __init__(self, in_channels=8, out_channels=8, stride=1):
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, 4, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(4)
        self.spatial = nn.Conv2d(4, 4, 3, stride, 1, bias=False)
        self.norm_b = nn.BatchNorm2d(4)
        self.expand = nn.Conv2d(4, out_channels, 1, bias=False)
        self.norm_c = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()
        self.proj = None
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.proj = nn.Sequential(nn.Identity(), conv, nn.BatchNorm2d(out_channels))

    def forward(self, x):
        y = self.act(self.norm_a(self.reduce(x)))
        y = self.act(self.norm_b(self.spatial(y)))
        y = self.norm_c(self.expand(y))
        return self.act(y + (x if self.proj is None else self.proj(x)))


ACCEPTED = [Paper, ReLUModules, Methods, Branching, Tutorial, OtherNames]


def assert_same_steps(fused, reference, shape=(4, 8, 9, 9)):
    for training in (True, True, False):
        fused.train(training)
        reference.train(training)
        x = torch.randn(shape, dtype=torch.float64)
        mine, its = (x.clone().requires_grad_() for _ in range(2))
        output, expected = fused(mine), reference(its)
        torch.testing.assert_close(output, expected, **TOLERANCE)
        grad = torch.randn_like(output)
        output.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(mine.grad, its.grad, **TOLERANCE)
    for a, b in zip(fused.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **TOLERANCE)
    for a, b in zip(fused.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("cls", ACCEPTED)
@pytest.mark.parametrize("arguments", [(8, 8), (8, 12, 2)], ids=["identity", "projection"])
def test_known_shapes_are_fused(cls, arguments):
    block = cls(*arguments).double()
    reference = copy.deepcopy(block)
    before = dict(vars(block))
    assert fuse(block) is block
    assert type(block) is not cls
    assert isinstance(block, cls)
    assert vars(block).keys() == before.keys()
    assert all(vars(block)[key] is value for key, value in before.items())
    assert str(block) == str(reference)
    report = fusion_report(block)
    assert report.fused == report.total, str(report)
    assert_same_steps(block, reference)

    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(block)
        assert_same_steps(other, copy.deepcopy(reference))
    assert type(unfuse(block)) is cls


@pytest.mark.parametrize("cls", [Methods, Tutorial])
def test_fused_blocks_compile(cls):
    block = cls(8, 12, 2).double()
    compiled = torch.compile(fuse(copy.deepcopy(block)), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), block(x), **TOLERANCE)


def test_input_is_passed_by_its_name():
    block = fuse(Methods())
    x = torch.randn(2, 8, 5, 5)
    assert block(input=x).shape == x.shape
    with pytest.raises(TypeError):
        block(x=x)


def test_shortcut_without_batch_norm():
    block = Paper(8, 8).double()
    block.shortcut = nn.AvgPool2d(3, 1, 1)
    reference = copy.deepcopy(block)
    assert {row.operator for row in fusion_report(fuse(block)).rows} == {"batch_norm+relu", "batch_norm+add+relu"}
    assert_same_steps(block, reference)


@pytest.mark.parametrize("cls", [Paper, Methods, Branching, Tutorial])
def test_operands_that_torch_broadcasts_or_promotes(cls):
    """Such a sum is left to torch, in place where the original is."""
    for arguments, dtype in (((1, 8), torch.float64), ((8, 8), torch.float32)):
        block = cls(*arguments)
        block.shortcut = nn.Sequential()
        block.double()
        if dtype != torch.float64:
            block.conv1.register_forward_pre_hook(lambda m, inputs: (inputs[0].double(),))
        reference = copy.deepcopy(block)
        x = torch.randn(2, arguments[0], 5, 5, dtype=dtype)
        output, expected = fuse(block)(x), reference(x)
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected, **TOLERANCE)


calls = []


class PreActivation(Base):
    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class NoLastReLU(Base):
    def forward(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)


class ReLUBeforeAdd(Base):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(F.relu(self.bn2(self.conv2(out))) + self.shortcut(x))


class ReLU6(Base):
    def forward(self, x):
        out = F.relu6(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Dropout(Base):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        out = self.dropout(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Scaled(Base):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) * 0.5 + self.shortcut(x))


class AddWithAlpha(Base):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(torch.add(self.bn2(self.conv2(out)), self.shortcut(x), alpha=2))


class InnerResidual(Base):
    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + h)


class WritesItsInput(Base):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        x += out
        return F.relu(x)


class SharedNorm(Base):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn1(self.conv2(out)) + self.shortcut(x))


class DependsOnData(Base):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        if out.sum() > 0:
            out = out * 2
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DependsOnMode(Base):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        if self.training:
            return F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class StochasticDepth(Base):
    def forward(self, x):
        if random.random() < 0.5:
            return x
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class TorchStochasticDepth(Base):
    def forward(self, x):
        scale = 1 if torch.rand(1).item() < 2 else 0
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))
        return out if scale else x


class KeepsFeatures(Base):
    def forward(self, x):
        self.features = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(self.features)) + self.shortcut(x))


class Counts(Base):
    def forward(self, x):
        calls.append(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class OwnMethod(Base):
    def branch(self, x):
        calls.append(x)
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        return F.relu(self.branch(x) + self.shortcut(x))


class SideCall(Base):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        self.relu(out)
        self.relu(out)
        out = self.bn2(self.conv2(F.relu(out)))
        return F.relu(out + self.shortcut(x))


class OwnBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(1)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class TwoInputs(Base):
    def forward(self, x, y):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(y))


class Overrides(Paper):
    def forward(self, x):
        return super().forward(x) * 2


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class OneConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + x)


class TwoOutputs(Base):
    def forward(self, x):
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))
        return out, x


REFUSED = {
    PreActivation: "ends with add",
    NoLastReLU: "ends with add",
    ReLUBeforeAdd: "main branch is conv, bn, relu, conv, bn, relu;",
    ReLU6: r"says `F\.relu6\(",
    Dropout: "main branch is conv, bn, relu, Dropout, conv, bn",
    Scaled: r"says `self\.bn2\(self\.conv2\(out\)\) \* 0\.5`",
    AddWithAlpha: r"says `torch\.add\(",
    InnerResidual: "adds relu",
    WritesItsInput: "adds into its shortcut in place",
    SharedNorm: "uses one convolution or BatchNorm twice",
    DependsOnData: r"branches on `out\.sum\(\)`",
    DependsOnMode: "differs between training and evaluation",
    StochasticDepth: r"branches on `random\.random\(\)`",
    TorchStochasticDepth: r"branches on `torch\.rand\(",
    KeepsFeatures: "writes attributes .*features",
    Counts: r"says `calls\.append\(x\)`",
    OwnMethod: "'branch', defined in its own class",
    SideCall: "does more than compute its result",
    OwnBuffer: "buffers of its own",
    TwoInputs: "does not take exactly one input",
    Overrides: r"more than its input and submodules \(super\(\)\)",
    Decorated: "more than its input and submodules",
    OneConvolution: "1 Conv2d and 1 BatchNorm",
    TwoOutputs: r"says `\(out, x\)`",
}


@pytest.mark.parametrize(("cls", "reason"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_near_misses_are_refused(cls, reason):
    block = cls()
    before, modes = dict(vars(block)), [m.training for m in block.modules()]
    state = copy.deepcopy(block.state_dict())
    calls.clear()
    model = fuse(nn.Sequential(block))
    assert type(block) is cls
    assert vars(block) == before
    assert [m.training for m in block.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    assert calls == []
    report = fusion_report(model)
    assert report.fused == 0
    for row in report.rows:
        assert re.search(reason, row.reason)


def test_other_activation_put_in_later():
    block = fuse(ReLUModules().double())
    block.relu = nn.SiLU()
    reference = unfuse(copy.deepcopy(block))
    assert_same_steps(block, reference)
    assert {row.reason for row in fusion_report(block).rows} == {"relu is a SiLU, not a ReLU"}


def test_plus_and_plus_equals_are_told_apart():
    assert fuse(Paper())._fusion_plan.add_inplace is True
    assert fuse(Branching())._fusion_plan.add_inplace is False
