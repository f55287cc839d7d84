"""BatchNormAddReLU2d and the two blocks against the torch modules they stand for, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import BatchNormAddReLU2d, FusedBottleneck, FusedResidualBlock
from resnet_fused.modules import batch_norm_add_relu, dual_batch_norm_add_relu

# Both sides compute in float64 and differ in the order of their sums. Up to 4 * 9 * 9 terms are summed, in convolutions
# up
# to 9 * 16: each sum is off by at most that many roundings of 1.1e-16, and a gradient passes fewer than ten such sums.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _on_the_device(device):
    """Tensors and modules are made on the backend's device."""
    if device.type == "cpu":
        yield
        return
    with device:
        yield


def tensor(*shape, channels_last=False):
    value = torch.randn(*shape, dtype=torch.float64)
    return value.contiguous(memory_format=torch.channels_last) if channels_last else value


def randomized(module):
    """Parameters and statistics away from their initial ones and zeros."""
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            for parameter in bn.parameters():
                nn.init.normal_(parameter)
            if bn.running_mean is not None:
                nn.init.normal_(bn.running_mean)
                nn.init.uniform_(bn.running_var, 0.5, 2)
    return module


def assert_same_step(fused, reference, *inputs, grad=None):
    """Same outputs, gradients and buffers of one call and its backward."""
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    output, expected = fused(*ours), reference(*theirs)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    grad = torch.randn_like(expected) if grad is None else grad
    output.backward(grad)
    expected.backward(grad)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, its.grad, **TOLERANCE)
    for (name, mine), its in zip(fused.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
    for mine, its in zip(fused.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, its, **TOLERANCE)
    return output


class Unfused(nn.Module):
    """A torch BatchNorm2d with the add and the ReLU after it."""

    def __init__(self, bn, relu):
        super().__init__()
        self.bn, self.relu = bn, relu

    def forward(self, input, residual=None):
        output = self.bn(input)
        output = output if residual is None else output + residual
        return F.relu(output) if self.relu else output


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"bias": False}, {"eps": 0.5}],
    ids=str,
)
def test_batch_norm_is_torchs(options, relu, residual, channels_last):
    torch.manual_seed(0)
    fused = randomized(BatchNormAddReLU2d(5, dtype=torch.float64, relu=relu, **options))
    bn_options = {key: value for key, value in options.items() if key != "bias"}
    bn = nn.BatchNorm2d(5, dtype=torch.float64, **bn_options)
    if "bias" in options:
        bn.bias = None
    bn.load_state_dict(fused.state_dict())
    reference = Unfused(bn, relu)
    for training in (True, True, False, True):
        fused.train(training)
        reference.train(training)
        inputs = [tensor(4, 5, 3, 3, channels_last=channels_last) for _ in range(1 + residual)]
        output = assert_same_step(fused, reference, *inputs)
        expected = torch.channels_last if channels_last else torch.contiguous_format
        assert output.is_contiguous(memory_format=expected)


def test_statistics_switched_off_later():
    torch.manual_seed(0)
    fused = randomized(BatchNormAddReLU2d(5, dtype=torch.float64))
    reference = Unfused(nn.BatchNorm2d(5, dtype=torch.float64), True)
    reference.bn.load_state_dict(fused.state_dict())
    fused.track_running_stats = reference.bn.track_running_stats = False
    for training in (True, False):
        assert_same_step(fused.train(training), reference.train(training), tensor(4, 5, 3, 3))
    assert fused.num_batches_tracked == 0


def test_interface():
    module = BatchNormAddReLU2d(8, 1e-3, 0.2, True, True, None, torch.float64, False)
    assert isinstance(module, nn.BatchNorm2d)
    assert (module.eps, module.momentum, module.weight.dtype, module.relu) == (1e-3, 0.2, torch.float64, False)
    assert list(module.state_dict()) == list(nn.BatchNorm2d(8).state_dict())
    assert repr(module).endswith("relu=False)")
    assert BatchNormAddReLU2d(8).relu is True
    assert BatchNormAddReLU2d(8, device="meta").weight.device.type == "meta"


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ([(4, 5, 3)], ValueError, "expected 4D"),
        ([(1, 5, 1, 1)], ValueError, "more than 1 value per channel"),
        ([(4, 6, 3, 3)], RuntimeError, None),
        ([(4, 5, 3, 3), (4, 1, 3, 3)], RuntimeError, "residual"),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_refusals_write_nothing(shapes, error, message, momentum):
    module = BatchNormAddReLU2d(5, momentum=momentum)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        module(*[torch.randn(shape) for shape in shapes])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_batch_once(use_reentrant, momentum, backend):
    torch.manual_seed(0)
    checkpointed = BatchNormAddReLU2d(5, momentum=momentum, dtype=torch.float64)
    plain = copy.deepcopy(checkpointed)
    with resnet_fused.backend(backend):
        for count in (1, 2, 3):
            x, residual = tensor(4, 5, 3, 3).requires_grad_(), tensor(4, 5, 3, 3)
            checkpoint(checkpointed, x, residual, use_reentrant=use_reentrant).square().sum().backward()
            plain(x, residual).square().sum().backward()
            assert checkpointed.num_batches_tracked == count
    for mine, its in zip(checkpointed.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(checkpointed.weight.grad, plain.weight.grad)


class DualUnfused(nn.Module):
    def __init__(self, bn, bn2):
        super().__init__()
        self.bn, self.bn2 = bn, bn2

    def forward(self, input, input2):
        return F.relu(self.bn(input) + self.bn2(input2))


class Dual(DualUnfused):
    def forward(self, input, input2):
        return dual_batch_norm_add_relu(self.bn, input, self.bn2, input2)


@pytest.mark.parametrize("modes", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_dual_in_any_combination_of_modes(modes, momentum):
    torch.manual_seed(0)
    bns = [nn.BatchNorm2d(5, eps=eps, momentum=momentum, dtype=torch.float64) for eps in (1e-5, 1e-2)]
    fused = randomized(Dual(*bns))
    reference = DualUnfused(*copy.deepcopy(bns))
    for model in (fused, reference):
        model.bn.train(modes[0])
        model.bn2.train(modes[1])
    for _ in range(2):
        assert_same_step(fused, reference, tensor(4, 5, 3, 3), tensor(4, 5, 3, 3))


def test_dual_with_one_batch_norm_on_both_branches():
    torch.manual_seed(0)
    bn = randomized(nn.BatchNorm2d(5, momentum=None, dtype=torch.float64))
    reference = copy.deepcopy(bn)
    assert_same_step(Dual(bn, bn), DualUnfused(reference, reference), tensor(4, 5, 3, 3), tensor(4, 5, 3, 3))
    assert bn.num_batches_tracked == 2


def test_dual_with_parameters_of_two_dtypes():
    torch.manual_seed(0)
    bn, bn2 = nn.BatchNorm2d(5), nn.BatchNorm2d(5).bfloat16()
    inputs = [torch.randn(4, 5, 3, 3, dtype=torch.bfloat16) for _ in range(2)]
    output = dual_batch_norm_add_relu(bn, inputs[0], bn2, inputs[1])
    expected = DualUnfused(nn.BatchNorm2d(5).double(), nn.BatchNorm2d(5).double())(*[x.double() for x in inputs])
    # Values below 8 carry roundings of 2^-9 each: one of each branch and one of the sum.
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3 * 8 * 2**-9)
    assert bn.num_batches_tracked == bn2.num_batches_tracked == 1


class UnfusedBlock(nn.Module):
    """The block as published: written with torch modules, keys as in FusedResidualBlock and FusedBottleneck."""

    def __init__(self, fused):
        super().__init__()
        self.order = getattr(fused, "bn2_before_conv2", False)
        for name, child in fused.named_children():
            child = copy.deepcopy(child)
            if isinstance(child, nn.BatchNorm2d):
                child = nn.BatchNorm2d(child.num_features, dtype=torch.float64)
            setattr(self, name, child)
        self.load_state_dict(fused.state_dict())

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.conv2(self.bn2(out)) if self.order else self.bn2(self.conv2(out))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(F.relu(out)))
        return F.relu(out + self.shortcut(x))


BLOCKS = {
    "basic": lambda **k: FusedResidualBlock(8, 8, **k),
    "basic projection": lambda **k: FusedResidualBlock(8, 12, 2, **k),
    "tutorial": lambda **k: FusedResidualBlock(8, 8, bn2_before_conv2=True, **k),
    "tutorial projection": lambda **k: FusedResidualBlock(8, 12, 2, bn2_before_conv2=True, **k),
    "bottleneck": lambda **k: FusedBottleneck(8, 2, **k),
    "bottleneck projection": lambda **k: FusedBottleneck(8, 4, 2, groups=2, base_width=32, **k),
    "bottleneck dilation": lambda **k: FusedBottleneck(8, 2, dilation=2, **k),
}
blocks = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())


@blocks
@pytest.mark.parametrize("channels_last", [False, True])
def test_blocks(make, channels_last):
    torch.manual_seed(0)
    fused = randomized(make(dtype=torch.float64))
    reference = UnfusedBlock(fused)
    for training in (True, True, False):
        fused.train(training)
        reference.train(training)
        assert_same_step(fused, reference, tensor(4, 8, 9, 9, channels_last=channels_last))


@blocks
def test_blocks_with_a_frozen_batch_norm(make):
    torch.manual_seed(0)
    fused = randomized(make(dtype=torch.float64))
    reference = UnfusedBlock(fused)
    for model in (fused, reference):
        [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][-1].eval()
    assert_same_step(fused, reference, tensor(4, 8, 9, 9))


@blocks
def test_blocks_whose_batch_norms_were_replaced(make):
    """What SyncBatchNorm.convert_sync_batchnorm and the folding of BatchNorm do to a block."""
    torch.manual_seed(0)
    fused = randomized(make(dtype=torch.float64)).eval()
    reference = UnfusedBlock(fused).eval()
    nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert type(fused.bn1) is nn.SyncBatchNorm
    assert_same_step(fused, reference, tensor(4, 8, 9, 9))


@blocks
def test_hooks_of_a_block_fire(make):
    block = make(dtype=torch.float64)
    calls = []
    bns = {name: m for name, m in block.named_modules() if isinstance(m, nn.BatchNorm2d)}
    x = tensor(2, 8, 5, 5)
    expected = copy.deepcopy(block)(x)
    for name, bn in bns.items():
        bn.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    torch.testing.assert_close(block(x), expected, **TOLERANCE)
    assert sorted(calls) == sorted(bns)


def test_keys_and_relu_of_the_blocks():
    for in_channels, stride in ((8, 1), (4, 1), (8, 2)):
        keys = list(FusedResidualBlock(in_channels, 8, stride).state_dict())
        projected = {"shortcut.0.weight", "shortcut.1.weight", "shortcut.1.num_batches_tracked"}
        assert projected.isdisjoint(keys) if (in_channels, stride) == (8, 1) else projected < set(keys)
        assert keys[0] == "conv1.weight"
        assert keys == list(FusedResidualBlock(in_channels, 8, stride, bn2_before_conv2=True).state_dict())
    block = FusedResidualBlock(4, 8)
    assert (block.bn1.relu, block.bn2.relu) == (True, True)
    assert isinstance(FusedResidualBlock(8, 8).shortcut, nn.Sequential)
    assert len(FusedResidualBlock(8, 8).shortcut) == 0
    tutorial = FusedResidualBlock(4, 8, bn2_before_conv2=True)
    assert (tutorial.bn1.relu, tutorial.bn2.relu) == (True, False)
    bottleneck = FusedBottleneck(64, 32, groups=4, base_width=16)
    assert bottleneck.conv2.weight.shape == (32, 8, 3, 3)
    assert bottleneck.bn3.num_features == 128
    assert {p.device.type for p in FusedBottleneck(4, 4, device="meta").parameters()} == {"meta"}


@blocks
def test_zero_init_residual_starts_as_the_shortcut(make):
    block = make(zero_init_residual=True, dtype=torch.float64)
    x = tensor(2, 8, 5, 5)
    torch.testing.assert_close(block(x), F.relu(copy.deepcopy(block.shortcut)(x)), **TOLERANCE)


@pytest.mark.parametrize("name", ["basic projection", "tutorial projection", "bottleneck"])
def test_blocks_compile(name):
    torch.manual_seed(0)
    fused = randomized(BLOCKS[name](dtype=torch.float64))
    reference = UnfusedBlock(fused)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, reference, tensor(4, 8, 9, 9))


def test_functions_bypass_the_hooks_of_plain_batch_norms():
    bn = nn.BatchNorm2d(5)
    bn.register_forward_hook(lambda *_: pytest.fail("called"))
    assert batch_norm_add_relu(bn, torch.randn(2, 5, 3, 3)).min() == 0
    assert bn.num_batches_tracked == 1


def test_a_forward_inside_a_backward_counts():
    """Only activation checkpointing makes activations again; a hook that runs a network trains it."""
    bn, reference = BatchNormAddReLU2d(3, relu=False), nn.BatchNorm2d(3)
    z = torch.randn(2, 3, 4, 4)
    for module in (bn, reference):
        hidden = torch.ones(2, requires_grad=True) * 2
        hidden.register_hook(lambda grad, module=module: (module(z), grad)[1])
        hidden.sum().backward()
    assert int(bn.num_batches_tracked) == 1
    torch.testing.assert_close(bn.running_mean, reference.running_mean)


@pytest.mark.parametrize("frozen", [False, True], ids=["same module", "one frozen"])
def test_refusals_of_two_branches_in_turn_write_nothing(frozen):
    bn, bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    bn.train(not frozen)
    with pytest.raises(RuntimeError, match="input2"):
        dual_batch_norm_add_relu(bn, torch.randn(2, 3, 4, 4), bn2 if frozen else bn, torch.randn(2, 3, 4, 5))
    for module in (bn, bn2):
        assert int(module.num_batches_tracked) == 0
        assert float(module.running_mean.abs().sum()) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [False, True])
def test_torch_jit_trace(training):
    """What is traced is torch's own operations, for a trace knows no others."""
    bn = BatchNormAddReLU2d(3).train(training)
    x, r = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(bn)(x, r)
    traced = torch.jit.trace(copy.deepcopy(bn), (x, r), check_trace=False)
    torch.testing.assert_close(traced(x, r), expected)


def test_a_batch_norm_that_torch_and_the_fused_operator_call_in_one_step():
    bn, reference = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = (bn(x) * batch_norm_add_relu(bn, x * 2)).sum()
    expected = (reference(x) * F.relu(reference(x * 2))).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))
    torch.testing.assert_close(bn.running_var, reference.running_var)
