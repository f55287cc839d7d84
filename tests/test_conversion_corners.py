"""fuse() in the corners of Python and of nn.Module: what looks at a BatchNorm while its output waits, odd sources."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_conversion_blocks import TOLERANCE, Base, assert_same_outputs, force
from torch import nn

from resnet_fused import fuse, fusion_report, unfuse
from resnet_fused.conversion.flow import Flow
from resnet_fused.conversion.selection import Selection

SCALE = 2
MEAN = torch.ones(3).numpy()


class ReadsStatistics(Base):
    """Values of a BatchNorm that has run, read while its output would wait."""

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        mean = self.bn1.running_mean * 1.0
        y = self.relu(y)
        z = self.bn2(self.conv2(y))
        seen = self.bn2.num_batches_tracked + 0
        z = self.relu(z + x)
        return y, z, mean, seen


class WritesParametersByAnotherName(Base):
    def forward(self, x):
        weight = self.bn1.weight.data
        y = self.bn1(self.conv1(x))
        weight *= 3
        y = self.relu(y)
        weight /= 3
        return self.relu(self.bn2(self.conv2(y)) + x)


class ReadsAProperty(Base):
    @property
    def mean(self):
        return self.bn1.running_mean.clone()

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        mean = self.mean
        return self.relu(y), mean


class Suppresses(Base):
    def forward(self, x):
        y = x
        with contextlib.suppress(ValueError, RuntimeError):
            y = self.bn1(self.conv1(x))
            y = self.relu(y + x[:, :3])
        return y


class OverwrittenByALoop(Base):
    def forward(self, x):
        y = x
        for y in range(3):
            z = y
            y = self.bn1(self.conv1(x))
        return F.relu(y) + z


class Remembers(nn.Module):
    """A shortcut that looks at a BatchNorm which is no part of it."""

    def __init__(self, bn):
        super().__init__()
        self.others = [bn]
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x) + self.others[0].running_mean.sum()


class WithRemembering(Base):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.remembers = Remembers(self.bn2)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.remembers(x)
        return self.relu(y)


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("on purpose")


class CatchesWhatAPartRaises(Base):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.inner = Inner()

    def forward(self, x):
        with contextlib.suppress(RuntimeError):
            x = self.inner(x)
        return self.relu(self.bn1(self.conv1(x)))


class Inner(Base):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.bad = Raises()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.bad(x))


class SharesStatistics(Base):
    """Two BatchNorms with the same running statistics, which see the batches in order."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.bn2.register_buffer(name, getattr(self.bn1, name))

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        z = self.bn2(self.conv2(x))
        return F.relu(z + y)


class Deletes(Base):
    def forward(self, x):
        y = x
        for _ in range(2):
            if self.training:
                y = self.bn1(self.conv1(x))
            y = self.relu(y)
        del (y,)
        if x.shape[0] != 4:
            y = self.bn2(self.conv2(x))
        if x.shape[0] == 4:
            return x
        return y


class AddsNumbers(Base):
    def forward(self, x):
        y = torch.add(self.bn1(self.conv1(x)), 1)
        y = torch.add(y, SCALE)
        return F.relu(torch.add(self.bn2(self.conv2(y)), x)) if MEAN is not None else y


class Unary(Base):
    def forward(self, x):
        mask = ~(x > 0)
        return -self.relu(self.bn1(self.conv1(x))) * +mask.double()


class ForeignClasses(Base):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.stages = nn.ModuleList([nn.Sequential(self.conv1, self.bn1, self.relu), nn.Identity()])

    def forward(self, x):
        for stage in self.stages:
            x = stage(x) * 2 if type(stage) is nn.Sequential else stage(x)
        return x


CORNERS = [ReadsStatistics, WritesParametersByAnotherName, ReadsAProperty, Suppresses, OverwrittenByALoop]
CORNERS += [WithRemembering, CatchesWhatAPartRaises, SharesStatistics, Deletes, AddsNumbers, Unary, ForeignClasses]


@pytest.mark.parametrize("cls", CORNERS)
def test_nothing_shows(cls):
    block = cls().double()
    reference = copy.deepcopy(block)
    force(fuse(block))
    assert_same_outputs(block, reference)
    flow = Flow(block, Selection(block).allows, hopeful=True)
    assert flow.lost == {}


def test_a_hook_on_a_shortcut_sees_the_statistics_of_the_step():
    seen = []
    for block in (fuse(Chained(8, 12, 2)), Chained(8, 12, 2)):
        torch.manual_seed(0)
        block.shortcut[0].register_forward_hook(lambda *_, bn=block.bn2: seen.append(bn.num_batches_tracked.item()))
        block(torch.randn(4, 8, 9, 9))
    assert seen == [1, 1]


class Chained(Base):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def test_a_base_looked_for_by_the_class_of_self():
    """It works in no subclass, so its class stays."""

    class Looking(Chained):
        def train(self, mode=True):
            return super(self.__class__, self).train(mode)

    block = fuse(Looking())
    assert type(block) is Looking
    assert "looks for its base by the class of self" in fusion_report(block).rows[0].reason
    block.train()


def test_a_class_that_refuses_attributes():
    class Strict(Chained):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise AttributeError("strict")
            super().__setattr__(name, value)

    block = Strict()
    assert type(fuse(block)) is not Strict
    assert type(unfuse(block)) is Strict


def test_private_arguments_are_refused():
    class Private(Base):
        def forward(self, x, *, __unused=None):
            return self.relu(self.bn1(self.conv1(x)))

    block = fuse(Private())
    assert type(block) is Private
    block(torch.randn(2, 8, 5, 5))


def test_warnings_of_a_source_are_not_given_again():
    class Compares(Base):
        def forward(self, x):
            mode = "training" if self.training else "eval"
            return self.relu(self.bn1(self.conv1(x))) if mode == "training" or x.ndim in (4, 5) else x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fusion_report(fuse(Compares())).fused == 1


def test_scripted_parts_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    model = nn.Sequential(scripted, nn.BatchNorm2d(8), nn.ReLU()).double()
    reference = copy.deepcopy(model)
    assert fusion_report(fuse(model)).fused == 1
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x), **TOLERANCE)


@pytest.mark.parametrize("features", [1, 4])
def test_frozen_norms_that_broadcast(features):
    torchvision = pytest.importorskip("torchvision")
    model = nn.Sequential(nn.Conv2d(3, 5 - features, 1), torchvision.ops.FrozenBatchNorm2d(features), nn.ReLU())
    reference = copy.deepcopy(model)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fuse(model)(x), reference(x))


class Branches(nn.Module):
    """Ways that multiply: two behind each block, and all of them into the next."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv2, self.bn = (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.conv(x)
        if x.sum() > 0:
            x = self.conv2(x)
        more = x.sum() > 1
        return F.relu(self.bn(self.conv(x)) + (x if more else self.conv(x)))


class Calls(nn.Module):
    def forward(self, x, n=30):
        return self.forward(self.forward(x, n - 1), n - 1) if x.sum() > n else x


def test_ways_that_multiply_are_not_followed_to_the_end():
    model = nn.Sequential(*(Branches() for _ in range(40)), Calls())
    flow = Flow(model, Selection(model).allows, hopeful=True)
    assert flow.steps < 2 * 50_000
    assert fusion_report(fuse(model)).fused == 40
