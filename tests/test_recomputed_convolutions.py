"""recompute="convolutions": outputs of wide 1x1 convolutions are made again too, with the same bits."""

import contextlib
import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_recompute import (
    MODIFIED,
    alive,
    assert_same,
    assert_same_step,
    cut,
    gradients,
    images,
    loss_of,
    randomized,
    resnet,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from resnet_fused import FusedBottleneck, functional, fuse, fusion_report, recompute, unfuse
from resnet_fused.cli import memory
from resnet_fused.measure import LiveMemory, SavedActivations

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(model=None):
    """One model fused, and a copy that makes convolutions again."""
    model = randomized(cut(resnet.Bottleneck) if model is None else model)
    return fuse(copy.deepcopy(model)), fuse(copy.deepcopy(model), recompute="convolutions")


class Convolutions(TorchDispatchMode):
    """Counts convolutions: a conv2d stays one where it runs below autograd."""

    COUNTED = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.COUNTED
        return func(*args, **(kwargs or {}))


MODELS = {
    "resnet50": lambda: cut(resnet.Bottleneck),
    "resnext50": lambda: cut(resnet.Bottleneck, groups=32, width_per_group=4),
    "resnet18": cut,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_to_the_bit(name, memory_format, dtype):
    kept, recomputed = pair(MODELS[name]().to(dtype, memory_format=memory_format))
    assert_same_step(kept, recomputed, images(dtype=dtype).contiguous(memory_format=memory_format))


def test_own_blocks():
    kept = randomized(nn.Sequential(FusedBottleneck(8, 2), FusedBottleneck(8, 4, 2), FusedBottleneck(16, 4)))
    recomputed = copy.deepcopy(kept)
    for block in recomputed:
        block.recompute = "convolutions"
    x = torch.randn(2, 8, 8, 8)
    step = lambda model, x: model(x).square().sum().backward()  # noqa: E731
    assert_same(gradients(recomputed, x, step), gradients(kept, x, step))
    assert "recompute='convolutions'" in repr(recomputed)


def test_a_forward_of_ones_own_with_a_bias():
    conv, narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
    weight = torch.ones(8, requires_grad=True)

    def step(model, x):
        with recompute(convolutions=True) if model is recomputed else recompute():
            hidden = functional.batch_norm_add_relu(conv(x), None, None, weight, training=True)
            hidden = F.conv2d(input=hidden, weight=narrow.weight, bias=narrow.bias)
        hidden.square().sum().backward()

    kept, recomputed = nn.Sequential(conv, narrow), nn.Sequential(conv, narrow)
    x = images(8)
    assert_same(gradients(recomputed, x, step), gradients(kept, x, step))
    with Convolutions() as calls:
        step(recomputed, x)
    # For the activation behind it and for its own BatchNorm; the one that makes fewer channels is kept.
    assert calls.count == 2 + 2


# Shares of eager's at 224x224 and batch 64; README.md has them: 0.248 of the saved bytes, 0.402 of the peak.
def test_saved_bytes_and_peak_as_a_share_of_eager_s():
    settings, model = memory.Settings("resnet50"), resnet.resnet50()
    variants = ("eager", "fused + recompute", "fused + recompute, convolutions too")
    steps = [memory.predict_fake(model, memory.CHANGES[variant], settings, 64) for variant in variants]
    assert steps[2].saved / steps[0].saved <= 0.25
    assert steps[2].peak / steps[0].peak <= 0.41
    assert steps[2].peak < 0.75 * steps[1].peak


def test_how_often_convolutions_run_again():
    """Once for a block's own backward, and once more where the output of a block is made for a later one."""
    _, model = pair()
    loss = loss_of(model, images())
    with Convolutions() as calls:
        loss.backward()
    # Four bottlenecks, and the projection of the first, whose stride is one. The last block's output is not made.
    ends, shortcuts, made_for_others = 4, 1, 2 + 1 + 1
    assert calls.count == ends + shortcuts + made_for_others


def test_a_long_chain_of_bottlenecks():
    """The transient peak stays below what is saved, and convolutions run three times at most."""
    length = 60
    model = nn.Sequential(*(FusedBottleneck(16, 4, recompute="convolutions") for _ in range(length)))
    x = torch.randn(2, 16, 12, 12)
    with LiveMemory(x, *model.parameters(), *model.buffers()) as memory, Convolutions() as calls:
        before = memory.bytes
        loss = model(x).square().sum()
        saved = memory.bytes - before
        forward = calls.count
        loss.backward()
    assert memory.peak - before - saved < 0.75 * saved
    assert calls.count - forward <= 3 * length


def test_convolutions_after_one_another_run_a_few_times():
    length = 30
    convs = nn.Sequential(*(nn.Conv2d(4 + i, 5 + i, 1) for i in range(length)))
    weight = torch.ones(4 + length, requires_grad=True)
    with recompute(convolutions=True):
        loss = functional.batch_norm_add_relu(convs(torch.randn(2, 4, 5, 5)), None, None, weight, training=True).sum()
    with Convolutions() as calls:
        loss.backward()
    assert calls.count <= 2 * length


@pytest.mark.parametrize("what", ["conv3.weight", "bn3.weight", "conv2.weight", "downsample.0.weight"])
def test_a_parameter_changed_in_place_is_refused(what):
    for model in pair():
        loss = loss_of(model, images())
        with torch.no_grad():
            model.layer1[0].get_parameter(what).add_(1)
        with pytest.raises(RuntimeError, match=MODIFIED):
            loss.backward()


def test_a_forward_without_a_backward_frees_all():
    _, model = pair()
    x = images()
    gc.collect()
    gc.disable()
    try:
        with LiveMemory(x, *model.parameters(), *model.buffers()) as memory:
            before = memory.bytes
            loss = loss_of(model, x)
            del loss
            assert memory.bytes == before
            loss = loss_of(model, x)
            loss.backward()
            model.zero_grad()
            assert memory.bytes - before <= 8  # the loss
    finally:
        gc.enable()
    assert not alive()


def _twice(model, x):
    loss = loss_of(model, x)
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, list(model.layer2.parameters()), retain_graph=True)
    loss.backward()


def _two_forwards(model, x):
    (loss_of(model, x) + loss_of(model, x.flip(0))).backward()


def _double_backward(model, x):
    (grad,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
    grad.square().sum().backward()


def _checkpointed(model, x):
    hidden = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    hidden = model.layer2(checkpoint(model.layer1, hidden, use_reentrant=False))
    model.fc(model.avgpool(hidden).flatten(1)).sum().backward()


def _on_cpu(model, x):
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model, x)
    loss.backward()


def _autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    F.cross_entropy(output.float(), torch.arange(4)).backward()


def _backward_under_autocast(model, x):
    loss = loss_of(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()


def _evaluation(model, x):
    model.eval()
    loss_of(model, x).backward()


def _nested(model, x):
    with recompute(), recompute(convolutions=True):
        loss = loss_of(model, x)
    loss.backward()


STEPS = (_twice, _two_forwards, _checkpointed, _on_cpu, _autocast, _evaluation, _nested)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_what_autograd_allows(step):
    assert_same_step(*pair(), step=step)


def test_a_backward_under_autocast_makes_them_in_their_own_dtype():
    """The backward of a convolution is not autocast: what is made again must not be either."""
    assert_same_step(*pair(), step=_backward_under_autocast)


def test_double_backward():
    assert_same_step(*pair(cut(resnet.Bottleneck).double()), images(dtype=torch.float64), _double_backward)


@pytest.mark.parametrize("part", ["layer1.0.conv3", "layer1.0", "layer1.0.bn3"])
def test_frozen_parts(part):
    kept, recomputed = pair()
    for model in (kept, recomputed):
        model.get_submodule(part).requires_grad_(False)
    assert_same_step(kept, recomputed)


def test_compiled_the_results_are_the_same():
    kept, recomputed = pair()
    x = images()
    compiled = [torch.compile(model, fullgraph=True, backend="aot_eager") for model in (recomputed, kept)]
    assert_same(*(gradients(model, x) for model in compiled))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_do_too(how):
    _, model = pair()
    x, copied = images(), how(model)
    with SavedActivations(model) as saved:
        loss_of(model, x)
    with SavedActivations(copied) as of_copy:
        loss_of(copied, x)
    assert of_copy.bytes == saved.bytes
    assert not any("recompute" in name for name in vars(unfuse(copied)))


def test_an_output_changed_in_place_is_kept():
    """Of what somebody wrote to, the recipe is that of another value."""
    conv = nn.Conv2d(3, 8, 1)

    def step(model, x):
        with recompute(convolutions=model is recomputed):
            hidden = conv(x)
            hidden.mul_(2)
            output = functional.batch_norm_add_relu(hidden, None, None, training=True)
        output.square().sum().backward()

    kept, recomputed = nn.Sequential(conv), nn.Sequential(conv)
    x = images()
    assert_same(gradients(recomputed, x, step), gradients(kept, x, step))


def test_a_bias_changed_in_place_is_not_refused():
    """Nor does torch."""

    def step(model, x):
        with recompute(convolutions=model is recomputed):
            loss = functional.batch_norm_add_relu(model(x), None, None, training=True).square().sum()
        with torch.no_grad():
            model[0].bias.add_(1)
        loss.backward()

    kept = nn.Sequential(nn.Conv2d(3, 8, 1))
    recomputed = copy.deepcopy(kept)
    x = images()
    assert_same(gradients(recomputed, x, step), gradients(kept, x, step))


def test_hooks_that_change_the_layout_of_a_weight():
    """A contiguous input and a channels_last weight make a channels_last output; the weight comes back contiguous."""
    conv = nn.Conv2d(3, 8, 1).to(memory_format=torch.channels_last)
    # As save_on_cpu(pin_memory=True) does; contiguous() takes a 1x1 weight of either layout as it is.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: torch.empty(t.shape).copy_(t), lambda t: t)

    def step(model, x):
        with hooks, recompute(convolutions=model is recomputed):
            loss = functional.batch_norm_add_relu(conv(x), None, None, training=True).square().sum()
        loss.backward()

    kept, recomputed = nn.Sequential(conv), nn.Sequential(conv)
    x = images(7)
    for ours, theirs in zip(gradients(recomputed, x, step), gradients(kept, x, step), strict=True):
        # Convolutions may choose another way: sums of up to 4 * 7 * 7 float32 terms of the order of one, of which each
        # addition rounds by 2**-24, some 2e-5 in all. Scrambled values are off by the order of one.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_around_what_is_compiled():
    kept, recomputed = pair()
    x = images()

    def step(model, x):
        with recompute(convolutions=True):
            loss = loss_of(model, x)
        loss.backward()

    compiled = [torch.compile(model, fullgraph=True, backend="aot_eager") for model in (recomputed, kept)]
    assert_same(*(gradients(model, x, step) for model in compiled))


def test_opaque_tensors():
    """They have no storage that a recipe could be found by."""
    with recompute(convolutions=True):
        output = torch.conv2d(images().to_mkldnn(), torch.ones(8, 3, 1, 1, requires_grad=True).to_mkldnn())
    assert output.shape == (4, 8, 24, 24)


def test_contexts_inside_each_other_keep_no_more():
    block = FusedBottleneck(8, 4, recompute="convolutions")
    x = torch.randn(2, 8, 8, 8)
    bytes_of = []
    for depth in (0, 3):
        with SavedActivations(block) as saved, contextlib.ExitStack() as stack:
            for _ in range(depth):
                stack.enter_context(recompute(convolutions=True))
            block(x)
        bytes_of.append(saved.bytes)
    assert bytes_of[0] == bytes_of[1]


def test_reported_and_refused():
    _, model = pair()
    report = fusion_report(model)
    assert all(row.recompute for row in report.rows)
    with pytest.raises(ValueError, match="recompute must be True, False or 'convolutions', got 'all'"):
        fuse(cut(), recompute="all")
    with pytest.raises(ValueError, match="recompute must be"):
        FusedBottleneck(8, 2, recompute=None)
    block = FusedBottleneck(8, 2)
    block.recompute = "convolution"
    with pytest.raises(ValueError, match="recompute must be"):
        block(torch.randn(2, 8, 4, 4))
