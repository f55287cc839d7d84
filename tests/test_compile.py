"""torch.compile with Inductor: values and gradients of fused networks, and how many graphs are compiled.

Inductor gives convolutions channels_last outputs, also those of NCHW models, after it has traced forward and backward.
The operators keep to the format that they were traced with: what a mask means must not change between the two.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_inductor_cache

from resnet_fused import FusedBottleneck, fuse

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Tiny(nn.Module):
    """Every operator: BN + ReLU, BN + add + ReLU, two branches and an add without BatchNorm.

    Behind the stem C = H·W = 64, so that the mask of NCHW and of channels_last have one shape.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 20, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(20)
        self.shortcut = nn.Sequential(nn.Conv2d(64, 20, 1, stride=2, bias=False), nn.BatchNorm2d(20))
        self.conv4 = nn.Conv2d(20, 20, 1)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.relu(self.bn3(self.conv3(x)) + self.shortcut(x))
        return F.relu(self.conv4(x) + x).flatten(1)


def _results(model, images, autocast, grad, original=None):
    """Output, gradients and buffers of one step, by name."""
    model.zero_grad()
    images = images.clone(memory_format=torch.preserve_format).requires_grad_(grad)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(images)
    results = {"output": output.detach()}
    if grad:
        # Weights that differ from element to element: a gradient in a wrong place shows.
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        (output * weights).sum().backward()
        results["grad of input"] = images.grad
        results |= {f"grad of {name}": p.grad for name, p in (original or model).named_parameters()}
    return results | {name: b.clone() for name, b in (original or model).named_buffers()}


def _assert_close(compiled, eager, exact, kinks=0.0):
    """The compiled model is as far from float64 as eager is, within what another order of sums makes of rounding.

    Errors are lengths of whole tensors, of which both have as many roundings. ``kinks`` is the share of a gradient that
    may hang on values within rounding of zero, which pass the ReLU in one and not in another. Where the mask is misread
    half of them are wrong, and the error is as long as the gradient.
    """
    for name, value in exact.items():
        error, allowed = ((r[name].double() - value.double()).norm() for r in (compiled, eager))
        least = torch.finfo(eager[name].dtype).eps if eager[name].is_floating_point() else 0
        share = kinks if name.startswith("grad") else 0.0
        assert error <= 3 * allowed + (4 * least + share) * value.double().norm(), (name, error, allowed)


def _models(make, format, **options):
    """A model in float64, it fused, a copy of that, the copy compiled, and the counter of its graphs."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager = make().to(memory_format=format)
    exact = copy.deepcopy(eager).double()
    if not isinstance(eager, nn.Sequential):
        fuse(eager, **options)
    counter = CompileCounterWithBackend("inductor")
    twin = copy.deepcopy(eager)
    return exact, eager, twin, torch.compile(twin, backend=counter, fullgraph=True), counter


def _images(batch, size, format):
    torch.manual_seed(1)
    return torch.randn(batch, 3, size, size).contiguous(memory_format=format)


def _check(models, images, autocast=False, grad=True, kinks=0.0):
    exact, eager, twin, compiled, _ = models
    reference = _results(exact, images.double(), False, grad)
    results = _results(compiled, images, autocast, grad, twin)
    _assert_close(results, _results(eager, images, autocast, grad), reference, kinks)


@pytest.fixture(scope="module", autouse=True)
def no_cache():
    """What Inductor compiled of other kernels is not taken up."""
    with fresh_inductor_cache():
        yield


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """With CI set, Inductor refuses to call an operator for which torch has a decomposition."""
    monkeypatch.setenv("CI", "1")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_tiny_network(format, autocast):
    """Training, twice, then evaluation with and without gradients: a graph each."""
    models = _models(Tiny, FORMATS[format])
    images = _images(2, 8, FORMATS[format])
    for _ in range(2):
        _check(models, images, autocast)
    assert models[-1].frame_count == 1
    for model in models[:3]:
        model.eval()
    _check(models, images, autocast)
    _check(models, images, autocast, grad=False)
    assert models[-1].frame_count == 3


@pytest.mark.parametrize("format", FORMATS)
def test_batch_of_another_size(format):
    """The second size compiles a graph for all sizes."""
    models = _models(Tiny, FORMATS[format])
    for batch in (2, 3, 5, 4):
        _check(models, _images(batch, 8, FORMATS[format]))
    assert models[-1].frame_count == 2


@pytest.mark.parametrize("recompute", [True, "convolutions"])
def test_recompute_is_off_and_harmless(recompute):
    models = _models(Tiny, torch.contiguous_format, recompute=recompute)
    _check(models, _images(2, 8, torch.contiguous_format))
    assert models[-1].frame_count == 1


@pytest.mark.parametrize("format", FORMATS)
def test_bottleneck_with_projection(format):
    """The package's own block, behind a convolution."""

    def make():
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), FusedBottleneck(16, 8, stride=2), nn.Flatten())

    models = _models(make, FORMATS[format])
    _check(models, _images(2, 9, FORMATS[format]))
    assert models[-1].frame_count == 1


@pytest.mark.parametrize(("format", "autocast"), [("nchw", False), ("channels_last", True)])
def test_resnet18(format, autocast):
    torchvision = pytest.importorskip("torchvision")
    models = _models(torchvision.models.resnet18, FORMATS[format])
    # Of its million activations about one is within rounding of zero: some percent of the image's gradient hang on it.
    _check(models, _images(4, 64, FORMATS[format]), autocast, kinks=0.05)
    assert models[-1].frame_count == 1
