"""verify(): a right conversion passes and changes nothing; a wrong one is caught, and the module named."""

import copy
import dataclasses
import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused import fuse, fusion_report, unfuse
from resnet_fused.conversion.verification import VerificationError, verify
from resnet_fused.example_inputs import made_up


class Block(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


class Net(nn.Module):
    """A stem, two layers of two blocks, dropout and a head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block(), Block())
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.conv1(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def caught(model, convert, example_inputs=IMAGES):
    with pytest.raises(VerificationError) as error:
        verify(model, convert, example_inputs)
    assert f"{error.value.module or 'the model'}: {error.value.what}" in str(error.value)
    return error.value


class Seen(torch.autograd.Function):
    """The identity, with a gradient that is a hundredth too large."""

    @staticmethod
    def forward(ctx, input):
        return input.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.01


def subclassed(module, forward):
    """Changes the class as fuse() does."""
    base = type(module)
    module.__class__ = type(base.__name__, (base,), {"forward": forward, "_fusion_base": base})


def test_fused_models_pass():
    torchvision = pytest.importorskip("torchvision")
    fused = []
    model = torchvision.models.resnet18(num_classes=10)
    verify(model, lambda copied: fused.append(fuse(copied)))
    assert fused
    assert all(copied is not model for copied in fused)
    verify(fuse(model), fuse, torch.randn(2, 3, 64, 64))
    assert type(unfuse(model)) is torchvision.models.ResNet


def test_a_transformers_model_is_called_with_pixel_values():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    assert list(next(made_up(model))[1]) == ["pixel_values"]
    verify(model, fuse)

    def convert(copied):
        copied.resnet.encoder.stages[1].layers[1].layer[0].normalization.eps = 0.1

    assert caught(model, convert, None).module.startswith("resnet.encoder.stages.1.layers.1.layer.0.normalization")


def test_a_detection_model_gets_images_and_targets():
    detection = pytest.importorskip("torchvision.models.detection")
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.BatchNorm2d(8), nn.ReLU())
    backbone.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(sizes=((16, 32),), aspect_ratios=((1.0,),))
    model = detection.RetinaNet(backbone, num_classes=3, anchor_generator=anchors, min_size=64, max_size=64)
    verify(model, fuse)

    def convert(copied):
        copied.backbone[1].eps = 0.1

    assert caught(model, convert, None).module == "backbone.1"


def test_nothing_is_changed(net):
    net.layer1.eval()
    hooked = []
    handle = net.fc.register_forward_hook(lambda *_: hooked.append(1))
    net(IMAGES).sum().backward()
    state = copy.deepcopy(net.state_dict())
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    members = {name: dict(vars(module)) for name, module in net.named_modules()}
    classes = [type(module) for module in net.modules()]
    inputs = IMAGES.clone()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    for convert in (fuse, lambda copied: copied.fc.register_forward_hook(lambda *_: torch.rand(1) + random.random())):
        try:
            verify(net, convert, inputs)
        except VerificationError:
            assert convert is not fuse
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2][1])
    assert np.random.get_state()[2:] == before[2][2:]
    assert torch.equal(inputs, IMAGES)
    assert inputs.grad is None
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert [type(module) for module in net.modules()] == classes
    assert {name: dict(vars(module)) for name, module in net.named_modules()} == members
    handle.remove()
    assert not net.fc._forward_hooks


def test_a_wrong_eps_is_found_in_its_block(net):
    def change(copied):
        copied.layer2[0].bn1.eps = 1e-4

    error = caught(net, change)
    assert (error.module, error.what) == ("layer2.0.bn1", "output in eval mode")

    def fused(copied):
        change(fuse(copied))

    # Hooks on what is fused would have it called, so the block is the closest.
    error = caught(net, fused)
    assert error.module == "layer2.0"


def test_a_wrong_operator_in_a_fused_module_is_found_without_hooks_that_turn_it_off(net):
    def forward(self, x):
        watched = any(module._forward_hooks for module in (self.bn1, self.bn2, self.relu))
        return Block.forward(self, x) * (1 if watched else 1.001)

    assert caught(net, lambda copied: subclassed(copied.layer1[1], forward)).module == "layer1.1"


def test_a_fused_module_inside_another_one_does_not_hide_it(net):
    def outer(self, x):
        return nn.Sequential.forward(self, x) * (1 if self[0]._forward_hooks else 1.001)

    def convert(copied):
        subclassed(copied.layer1, outer)
        subclassed(copied.layer1[0], Block.forward)

    assert caught(net, convert).module == "layer1"


def test_a_wrong_gradient_alone_is_found_nearest_to_the_output(net):
    def convert(copied):
        subclassed(copied.layer2[0].bn1, lambda self, x: Seen.apply(nn.BatchNorm2d.forward(self, x)))

    error = caught(net, convert)
    assert error.module == "layer2.0.bn1"
    assert error.what == "gradient of parameter weight in eval mode"


def test_a_wrong_gradient_of_the_input_alone(net):
    def convert(copied):
        subclassed(copied, lambda self, x: Net.forward(self, Seen.apply(x)))

    error = caught(net, convert)
    assert (error.module, error.what) == ("", "gradient of the input in eval mode")


def test_a_missing_gradient(net):
    def convert(copied):
        copied.fc.bias.requires_grad_(False)

    error = caught(net, convert)
    assert (error.module, error.what) == ("fc", "gradient of parameter bias in eval mode")
    assert "is missing" in str(error)


def test_wrong_running_statistics_alone(net):
    def convert(copied):
        copied.layer2[0].bn2.momentum = 0.1 + 1e-6

    error = caught(net, convert)
    assert (error.module, error.what) == ("layer2.0.bn2", "buffer running_mean in train mode")


def test_a_counter_of_batches_that_stands_still(net):
    def forward(self, x):
        count = self.num_batches_tracked.clone()
        output = nn.BatchNorm2d.forward(self, x)
        self.num_batches_tracked.copy_(count)
        return output

    error = caught(net, lambda copied: subclassed(copied.layer1[0].bn2, forward))
    assert (error.module, error.what) == ("layer1.0.bn2", "buffer num_batches_tracked in train mode")


@pytest.mark.parametrize("training", [False, True])
def test_a_difference_in_one_mode_alone(net, training):
    def forward(self, x):
        return Block.forward(self, x) * (1 + 1e-6 * (self.training == training))

    error = caught(net, lambda copied: subclassed(copied.layer2[0], forward))
    assert error.module == "layer2.0"
    assert error.what == f"output in {'train' if training else 'eval'} mode"


def test_a_difference_without_gradients_alone(net):
    def forward(self, x):
        return Block.forward(self, x) * (1 if torch.is_grad_enabled() else 2)

    error = caught(net, lambda copied: subclassed(copied.layer2[0], forward))
    assert (error.module, error.what) == ("layer2.0", "output in eval mode under no_grad")


def test_an_input_that_is_written_to():
    class Rectified(nn.Module):
        def forward(self, x):
            return x.relu()

    def forward(self, x):
        return x.relu_().clone()

    error = caught(Rectified(), lambda copied: subclassed(copied, forward))
    assert (error.module, error.what) == ("", "input after the call in eval mode")
    assert (IMAGES < 0).any()


def test_a_converted_model_that_raises(net):
    def forward(self, x):
        raise RuntimeError("out of luck")

    error = caught(net, lambda copied: subclassed(copied.layer2[0], forward))
    assert error.module == "layer2.0"
    assert "RuntimeError (out of luck)" in str(error)


def test_modes_are_kept_in_the_train_run(net):
    modes = []

    def convert(copied):
        modes.append((copied.training, copied.layer1[0].bn1.training, copied.layer2.training))

    net.layer1.eval()
    verify(net, convert, IMAGES)
    assert modes == [(False,) * 3, (False,) * 3, (True, False, True)]
    modes.clear()
    verify(net.eval(), convert, IMAGES)
    assert modes == [(False,) * 3, (False,) * 3, (True,) * 3]
    assert not net.training

    def wrong(copied):
        copied.layer1[0].bn1.train(copied.training)

    net.train().layer1.eval()
    error = caught(net, wrong)
    assert (error.module, error.what) == ("layer1.0.bn1", "output in train mode")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: list
    note: str = ""


class Many(Net):
    def forward(self, images, mask=None, *, scale=1.0):
        features = self.layer1(self.conv1(images))
        logits = self.fc(features.mean((2, 3))) * scale
        return {"output": Output(logits, [features, logits.argmax(1)]), "mask": (mask, None, 3)}


@pytest.mark.parametrize(
    "example_inputs",
    [IMAGES, (IMAGES, torch.arange(3)), [IMAGES], {"images": IMAGES, "scale": 2.0}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_inputs_and_outputs_of_many_kinds(example_inputs):
    torch.manual_seed(0)
    model = Many()
    verify(model, fuse, example_inputs)

    def convert(copied):
        copied.fc.weight.data[0] *= 1 + 1e-6

    assert caught(model, convert, example_inputs).module == "fc"

    def shifted(copied):
        subclassed(copied, lambda self, *args, **named: [Many.forward(self, *args, **named), torch.ones(1)])

    assert "tensors, and had" in str(caught(model, shifted, example_inputs))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), (4, 2, 64)),
        (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU()), (4, 2, 16, 16, 16)),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), (4, 4, 64, 64)),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (4, 6)),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4 * 32 * 32, 2)), (4, 2, 32, 32)),
    ],
)
def test_made_up_inputs(model, shape):
    shapes = []

    def convert(copied):
        copied.register_forward_pre_hook(lambda module, arguments: shapes.append(arguments[0].shape))

    verify(model, convert)
    assert set(shapes) == {torch.Size(shape)}


class Awkward(Net):
    """A network that takes no float64."""

    def forward(self, x):
        if x.dtype == torch.float64:
            raise RuntimeError("float32 alone")
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_does_not_run_in_double(dtype):
    torch.manual_seed(0)
    model = Awkward().to(dtype)
    verify(model, fuse, IMAGES.to(dtype))

    def convert(copied):
        copied.layer2[1].bn2.bias.data += 2

    assert caught(model, convert, IMAGES.to(dtype)).module == "layer2.1.bn2"


def test_not_a_number_is_equal_to_itself():
    class Undefined(Net):
        def forward(self, x):
            output = super().forward(x)
            return torch.stack([output, output.detach() / 0, output.detach() * float("nan")])

    torch.manual_seed(0)
    model = Undefined()
    verify(model, fuse, IMAGES)

    def convert(copied):
        subclassed(copied, lambda self, x: Undefined.forward(self, x).flip(0))

    assert "NaN or infinity in other places" in str(caught(model, convert))


def test_values_that_are_zero_but_for_rounding():
    # The mean of what is normalized: of other sums it is other rounding, and nothing of it is right.
    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv, self.bn2 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.bn(x)
            return x.mean((0, 2, 3)), self.bn2(self.conv(x))

    def convert(copied):
        def forward(self, x):
            self.bn.train(self.training)
            outer = self.bn(x.flip(0, 2, 3)).flip(0, 2, 3)
            return outer.mean((0, 2, 3)), self.bn2(self.conv(outer))

        subclassed(copied, forward)

    torch.manual_seed(0)
    model = Means()
    model.conv.bias.data.zero_()
    verify(model, convert, torch.randn(4, 3, 9, 9))


def test_an_example_that_amplifies_rounding():
    torchvision = pytest.importorskip("torchvision")
    # Two values a channel in layer4: normalized they are 1 and -1, and their gradients all but cancel.
    for seed in range(2):
        torch.manual_seed(seed)
        model = torchvision.models.resnet18(num_classes=10)
        verify(model, fuse, torch.randn(2, 3, 32, 32))


class Unsteady(Net):
    generator = torch.Generator()

    def forward(self, x):
        return super().forward(x + 1e-3 * torch.rand(x.shape, generator=self.generator).to(x))


def test_a_model_with_random_numbers_of_its_own():
    with pytest.raises(ValueError, match="not deterministic"):
        verify(Unsteady(), fuse, IMAGES)


def test_a_model_on_meta(net):
    with pytest.raises(ValueError, match="on a real device"):
        verify(net.to("meta"), fuse, IMAGES)


def test_inputs_that_cannot_be_made_up():
    class Words(nn.Module):
        def forward(self, words):
            return words

    with pytest.raises(ValueError, match="give example_inputs"):
        verify(Words(), fuse)

    class Pair(Net):
        def forward(self, x, y):
            return super().forward(x + y)

    with pytest.raises(ValueError, match=r"give example_inputs.*missing 1 required positional argument: 'y'"):
        verify(Pair(), fuse)


def test_inputs_that_do_not_fit(net):
    with pytest.raises(ValueError, match="does not run on example_inputs: RuntimeError: Given groups"):
        verify(net, fuse, torch.randn(2, 5, 16, 16))


def test_a_model_without_tensors_or_copies(net):
    class Silent(Net):
        def forward(self, x):
            return "done"

    with pytest.raises(ValueError, match="returns no tensor"):
        verify(Silent(), fuse, IMAGES)
    net.features = net.conv1(IMAGES)
    with pytest.raises(ValueError, match="cannot be copied"):
        verify(net, fuse, IMAGES)


class Counting(nn.Module):
    """A forward with effects beside its result: a counter, a list, and a tensor kept for later."""

    def __init__(self, add=1, factor=1.0):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.calls, self.seen, self.features, self.started = 0, [], None, 0.0
        self.add, self.factor = add, factor

    def forward(self, x):
        self.calls += self.add
        self.seen.append(tuple(x.shape))
        self.started = time.perf_counter()
        x = F.relu(self.bn(self.conv(x)))
        self.features = x.detach() * self.factor
        return x


def test_attributes_that_a_forward_sets():
    model = Counting()
    assert fusion_report(fuse(model, verify=True)).fused == 1
    assert (model.calls, model.seen, model.features) == (0, [], None)


@pytest.mark.parametrize(
    ("change", "what", "how"),
    [
        ({"add": 2}, "attribute calls", "is 2, and was 1"),
        ({"add": 0}, "attribute calls", "is 0, and was 1"),
        ({"factor": 1.001}, "attribute features", "differs by"),
        ({"seen": [1]}, "attribute seen", "is 1, 2, 3,"),
    ],
)
def test_an_attribute_that_differs(change, what, how):
    def convert(copied):
        for name, value in change.items():
            setattr(copied[0], name, value)

    with pytest.raises(VerificationError) as caught:
        verify(nn.Sequential(Counting()), convert, torch.randn(2, 3, 8, 8))
    assert (caught.value.module, caught.value.what) == ("0", f"{what} in eval mode")
    assert how in str(caught.value)


def test_a_parameter_that_is_written_to():
    def write(module, *_):
        module.conv.bias.data.add_(1.0)

    def convert(copied):
        copied[0].register_forward_hook(write)

    with pytest.raises(VerificationError) as caught:
        verify(nn.Sequential(Counting()), convert, torch.randn(2, 3, 8, 8))
    assert (caught.value.module, caught.value.what) == ("0.conv", "parameter bias in eval mode")
