"""fuse() on residual blocks of other classes: in whatever spelling, and where they are something else."""

import copy
import pickle
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused import fuse, fusion_report, unfuse
from resnet_fused.conversion import classes, families, fused_class
from resnet_fused.conversion.selection import Selection

# As in test_modules.py: float64 on both sides, sums of at most 4 * 9 * 9 terms.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}


def force(model):
    """Rewrites all that can be, also where nothing is fused by it: what it may not change shows there too."""
    families.learn({type(module) for module in model.modules()})
    selection = Selection(model)
    for module in list(model.modules()):
        if not classes.is_fused(module) and selection.allows(module):
            module.__class__ = fused_class.class_for(type(module), False)
    return model


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
        outputs = []
        for block, leaf in ((fused, mine), (reference, its)):
            random.seed(3)
            torch.manual_seed(3)
            outputs.append(block(leaf * 1))  # what may be written into
        output, expected = outputs
        torch.testing.assert_close(output, expected, **TOLERANCE)
        grad = torch.randn_like(output)
        output.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(mine.grad, its.grad, **TOLERANCE)
    for a, b in zip(fused.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **TOLERANCE)
    for a, b in zip(fused.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def assert_same_outputs(fused, reference):
    with torch.no_grad():
        for training in (True, True, False):
            x = torch.randn(4, 8, 9, 9, dtype=torch.float64)
            mine, its = x.clone(), x.clone()
            outputs = [block.train(training)(input) for block, input in ((fused, mine), (reference, its))]
            torch.testing.assert_close(*outputs, **TOLERANCE)
            torch.testing.assert_close(mine, its, **TOLERANCE)
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


ALONE, RELU, ADD = "batch_norm", "batch_norm+relu", "batch_norm+add+relu"
# For bn1 and bn2 the operator, and why it is no other.
OTHER = "goes to other code than a ReLU or an add"
NEAR_MISSES = {
    PreActivation: [(RELU, None), (RELU, None)],
    NoLastReLU: [(RELU, None), (ALONE, "its sum leaves the module")],
    ReLUBeforeAdd: [(RELU, None), (RELU, None)],
    ReLU6: [(ALONE, OTHER), (ADD, None)],
    Dropout: [(RELU, None), (ADD, None)],
    Scaled: [(RELU, None), (ALONE, OTHER)],
    AddWithAlpha: [(RELU, None), (ALONE, OTHER)],
    InnerResidual: [(RELU, None), (ADD, None)],
    WritesItsInput: [(RELU, None), (ALONE, OTHER)],
    SharedNorm: [(RELU, None), (None, "no forward that is read calls it")],
    DependsOnData: [(RELU, None), (ADD, None)],
    DependsOnMode: [(RELU, None), (RELU, None)],
    StochasticDepth: [(RELU, None), (ADD, None)],
    TorchStochasticDepth: [(RELU, None), (ADD, None)],
    KeepsFeatures: [(RELU, None), (ADD, None)],
    Counts: [(RELU, None), (ADD, None)],
    OwnMethod: [(RELU, None), (ALONE, OTHER)],
    SideCall: [(ALONE, OTHER), (ADD, None)],
    OwnBuffer: [(RELU, None), (ADD, None)],
    Overrides: [(None, "no forward that is read calls it")] * 2,
    Decorated: [(None, "wrapped by a decorator")] * 2,
    OneConvolution: [(ADD, None)],
}


@pytest.mark.parametrize(("cls", "expected"), NEAR_MISSES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_near_misses_are_fused_where_they_are_none(cls, expected):
    """Parts of them are what is fused; the rest runs as it was written, with all that it does beside."""
    block, reference = cls().double(), cls().double()
    reference.load_state_dict(block.state_dict())
    before, modes = dict(vars(block)), [m.training for m in block.modules()]
    state = copy.deepcopy(block.state_dict())
    calls.clear()
    model = fuse(nn.Sequential(block))
    report = fusion_report(model)
    assert vars(block) == before
    assert [m.training for m in block.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    assert calls == []
    for row, (operator, reason) in zip(report.rows, expected, strict=True):
        assert row.operator == operator, str(report)
        assert row.fused == (operator is not None)
        assert row.reason is None if reason is None else re.search(reason, row.reason), str(report)
    if cls in (WritesItsInput, SideCall, Decorated):  # torch refuses a backward through them
        assert_same_outputs(block, reference)
    else:
        assert_same_steps(block, reference)
    assert len(calls) % 2 == 0  # by the fused block as often as by the other
    assert getattr(block, "seen", 0) == getattr(reference, "seen", 0)
    if hasattr(reference, "features"):
        torch.testing.assert_close(block.features, reference.features, **TOLERANCE)


def test_several_inputs_and_outputs():
    for cls in (TwoInputs, TwoOutputs):
        block = cls().double()
        reference = copy.deepcopy(block)
        assert fusion_report(fuse(block)).fused == 2
        inputs = [torch.randn(2, 8, 5, 5, dtype=torch.float64) for _ in range(1 + (cls is TwoInputs))]
        torch.testing.assert_close(block(*inputs), reference(*inputs), **TOLERANCE)
        with pytest.raises(TypeError, match=r"missing [12] required positional argument"):
            block()


def test_other_activation_put_in_later():
    block = fuse(ReLUModules().double())
    block.relu = nn.SiLU()
    reference = unfuse(copy.deepcopy(block))
    assert_same_steps(block, reference)
    reasons = {row.name: row.reason for row in fusion_report(block).rows}
    assert reasons == {"bn1": "its output goes to relu (SiLU)", "bn2": "its sum goes to relu (SiLU)"}


class WritesWhatANormReads(Base):
    """The BatchNorm of an input that is changed before its output is used."""

    def forward(self, x):
        out = self.bn1(x)
        x += 1
        out = self.relu(out)
        shortcut = self.bn2(x)
        x.mul_(2)
        y = self.conv1(x)
        x -= 1
        shortcut = shortcut + out
        y.neg_()
        return F.relu(shortcut), y


class SumsWhatIsWritten(Base):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out = out + x
        x.mul_(3)
        out = self.relu(out)
        y = self.bn2(out)
        out.zero_()
        return F.relu(y + x)


class NormTwice(Base):
    """One BatchNorm, whose running statistics see the first use first."""

    def forward(self, x):
        a = self.bn1(self.conv1(x))
        b = self.bn1(self.conv2(x))
        return F.relu(b + a)


class ChangesItsNorm(Base):
    def forward(self, x):
        a = self.bn1(self.conv1(x))
        self.bn1.eps = 0.5 - self.bn1.eps
        a = self.relu(a)
        b = self.bn2(self.conv2(x))
        self.bn2.train(not self.bn2.training)
        return F.relu(b + a)


class DropsANorm(Base):
    """A BatchNorm whose output nobody reads on some paths still sees its batch."""

    def forward(self, x):
        a = self.bn1(self.conv1(x))
        b = self.bn2(self.conv2(x))
        if x.sum() > 0:
            return self.relu(a)
        a = x
        del b
        return F.relu(a)


class DropsANormByShape(Base):
    def forward(self, x):
        a = self.bn1(self.conv1(x))
        b = self.bn2(self.conv2(x))
        if self.training:
            return self.relu(b)
        elif x.shape[-1] == 9:
            a = b
        return F.relu(a)


class UsesOnOneArm(Base):
    def forward(self, x):
        a = self.bn1(self.conv1(x))
        b = self.bn2(self.conv2(x))
        y = self.relu(a) if self.training else x
        return y + (self.training or self.relu(b) + 1)


class AddsIntoWhatOthersHold(Base):
    """The shortcut is the input itself, which the sum is written into."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.keep = nn.Identity()

    def forward(self, x):
        y = self.keep(x)
        y += self.bn1(self.conv1(x))
        y = self.relu(y)
        return y + self.keep(x).add_(self.bn2(self.conv2(y))).relu_()


class GradModes(Base):
    def forward(self, x):
        with torch.no_grad():
            a = self.bn1(self.conv1(x))
        a = self.relu(a)
        try:
            b = self.bn2(self.conv2(x))
        finally:
            b = self.relu(b)
        return a + b


class Looks(Base):
    """A value is read by a lambda, a comprehension, an inner function and as an attribute."""

    def forward(self, x):
        a = self.bn1(self.conv1(x))
        read = lambda: a + 1  # noqa: E731
        b = self.bn2(self.conv2(x))
        several = [b * i for i in range(3)]

        def inner():
            return self.relu(b)

        return F.relu(read()) + inner() + sum(several) + (a if (c := self.relu(a)) is not None else b) + c * a.ndim


TRICKY = [WritesWhatANormReads, SumsWhatIsWritten, NormTwice, ChangesItsNorm, DropsANorm, DropsANormByShape]
TRICKY += [UsesOnOneArm, AddsIntoWhatOthersHold, GradModes, Looks]


@pytest.mark.parametrize("cls", TRICKY)
def test_the_order_in_which_things_happen_stays(cls):
    block = cls().double()
    reference = copy.deepcopy(block)
    assert type(force(fuse(block))) is not cls
    assert_same_outputs(block, reference)
    assert reference.bn1.num_batches_tracked == block.bn1.num_batches_tracked > 0


class NoGradBranch(Base):
    """A part whose BatchNorm runs in another grad mode than the add of the block around it."""

    def forward(self, x):
        with torch.no_grad():
            return self.bn1(self.conv1(x))


class AroundNoGradBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.conv, self.bn = NoGradBranch(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.branch(x))


def test_grad_modes_stay_around_what_a_part_gives():
    block = AroundNoGradBranch().double()
    reference = copy.deepcopy(block)
    force(fuse(block))
    x = torch.randn(4, 8, 9, 9, dtype=torch.float64)
    for one in (block, reference):
        one(x).sum().backward()
        assert all(parameter.grad is None for parameter in one.branch.parameters())
    torch.testing.assert_close(block.bn.weight.grad, reference.bn.weight.grad, **TOLERANCE)


class AddsPlainly(Base):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out = out + x
        return F.relu(out)


def test_plus_and_plus_equals_are_told_apart():
    """Into a narrower sum torch adds in place and does not widen it."""
    for cls, dtype in ((Paper, torch.float32), (AddsPlainly, torch.float64)):
        block = fuse(cls())
        block.conv1.register_forward_pre_hook(lambda m, inputs: (inputs[0].float(),))
        assert block(torch.randn(2, 8, 5, 5, dtype=torch.float64)).dtype == dtype
