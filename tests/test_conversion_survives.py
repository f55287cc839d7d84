"""fuse() beside what training code does with models: copies, wrappers, freezing, parametrizations, compilers."""

import collections
import copy
import os
import pathlib
import pickle
import py_compile
import re
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from test_conversion_families import (
    ADD,
    ALONE,
    DUAL,
    RELU,
    Recorder,
    assert_all_close,
    compare,
    images,
    randomized,
    reasons,
    step,
    tensors,
    timm_resnet,
)
from torch import distributed, nn
from torch.nn.utils import parametrizations, parametrize

from resnet_fused import fuse, fusion_report, unfuse
from resnet_fused.conversion import kinds
from resnet_fused.measure import SavedActivations

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

ROOT = pathlib.Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# Models of which every BatchNorm is fused.


def timm_basic():
    """As resnet10t, narrower: {RELU: 7, DUAL: 8}."""
    return timm_resnet(stem_type="deep_tiered", avg_down=True)


def timm_bottleneck():
    """As resnet26d, narrower: {RELU: 11, DUAL: 8}."""
    return timm_resnet("Bottleneck", stem_type="deep", avg_down=True)


def timm_preactivation():
    """As resnetv2_18, narrower, with BatchNormAct2d: {RELU: 10}."""
    layers = timm.layers
    options = {"norm_layer": layers.BatchNormAct2d, "conv_layer": layers.create_conv2d, "num_classes": 3}
    return timm.models.resnetv2.ResNetV2((1, 1, 1), channels=(8, 16, 24), stem_chs=8, **options)


def torchvision_basic(**options):
    """Of two stages: {RELU: 3, ADD: 1, DUAL: 2}."""
    resnet = torchvision.models.resnet
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3, **options)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 3)
    return model


def torchvision_frozen():
    """The same with FrozenBatchNorm2d."""
    return torchvision_basic(norm_layer=torchvision.ops.FrozenBatchNorm2d)


class Classifier(nn.Module):
    """A model of transformers that takes and gives a tensor."""

    def __init__(self, kind="bottleneck"):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1]}
        self.model = transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type=kind, **sizes))

    def forward(self, x):
        return self.model(x).logits


MODELS = [timm_basic, timm_bottleneck, timm_preactivation, torchvision_basic, torchvision_frozen, Classifier]
OPERATORS = {
    timm_basic: {RELU: 7, DUAL: 8},
    timm_bottleneck: {RELU: 11, DUAL: 8},
    timm_preactivation: {RELU: 10},
    torchvision_basic: {RELU: 3, ADD: 1, DUAL: 2},
    torchvision_frozen: {RELU: 3, ADD: 1, DUAL: 2},
    Classifier: {RELU: 7, ADD: 2, DUAL: 2},
}
every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


def pair(make):
    reference = randomized(make().double())
    return fuse(copy.deepcopy(reference)), reference


def assert_same_step(model, reference, x=None, seed=5):
    inputs = {"_x": images(64) if x is None else x}
    for mine, its in zip(step(model, inputs, True, seed), step(reference, inputs, True, seed), strict=True):
        assert_all_close(mine, its, "output and gradients")
    assert_all_close(list(float_buffers(model)), list(float_buffers(reference)), "buffer")


def float_buffers(model):
    return (buffer for buffer in model.buffers() if buffer.is_floating_point())


def assert_all_fused(model):
    report = fusion_report(model)
    assert report.fused == report.total > 0, str(report)


def classes(model):
    return [type(module) for module in model.modules()]


# Twice, parts, copies


@every_model
def test_fusing_twice_is_fusing_once(make):
    model = fuse(make())
    before, report = classes(model), fusion_report(model)
    assert fuse(model) is model
    assert classes(model) == before
    assert fusion_report(model) == report
    assert_all_fused(model)
    # But for what the second call asks for otherwise.
    recomputing = fusion_report(fuse(model, recompute=True))
    assert recomputing == fusion_report(fuse(make(), recompute=True))
    assert [row.recompute for row in recomputing.rows] == [True] * report.total
    assert fusion_report(fuse(model)) == report


@every_model
def test_nothing_of_a_model_changes_but_classes(make):
    model = make()
    state, text = model.state_dict(keep_vars=True), str(model)
    modules = dict(model.named_modules())
    before = classes(model)
    fuse(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is tensor for name, tensor in state.items())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert str(model) == text
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), before, strict=True))
    assert classes(model) != before
    assert classes(unfuse(model)) == before


LAYER1 = ["layer1.0.bn1", "layer1.0.bn2"]
LAYER2 = ["layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1"]
CHOICES = {
    "include a name": ({"include": "layer2"}, LAYER2),
    "include the name of a block": ({"include": "layer2.0"}, LAYER2),
    "include a pattern": ({"include": "*2"}, LAYER2),
    "include by a predicate": ({"include": lambda name, module: name.startswith("layer2")}, LAYER2),
    "include a list": ({"include": ["layer2.0", lambda name, module: name == "layer1"]}, LAYER1 + LAYER2),
    "exclude a name": ({"exclude": "layer1"}, ["bn1", *LAYER2]),
    "exclude a pattern": ({"exclude": "layer[23].*"}, ["bn1", *LAYER1]),
    "exclude by a predicate": ({"exclude": lambda name, module: "Block" in type(module).__name__}, ["bn1"]),
    "exclude a list": ({"exclude": ["layer1.0", "layer2.0"]}, ["bn1"]),
    "both": ({"include": "layer*", "exclude": ["layer1"]}, LAYER2),
    "exclude all": ({"exclude": lambda name, module: name == ""}, []),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_parts_of_a_model_can_be_chosen(choice):
    reference = randomized(torchvision_basic().double())
    arguments, expected = CHOICES[choice]
    model = fuse(copy.deepcopy(reference), **arguments)
    rows = fusion_report(model).rows
    assert [row.name for row in rows if row.fused] == expected
    assert all("excluded from fuse()" in row.reason for row in rows if not row.fused)
    assert len(rows) == 6
    assert_same_step(model, reference)
    assert_all_fused(fuse(model))


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_patterns_that_are_none(argument):
    model = torchvision_basic()
    before = classes(model)
    for wrong in (3, [3], True):
        with pytest.raises(TypeError, match=argument):
            fuse(model, **{argument: wrong})
    with pytest.raises(ValueError, match=r"layer9.*matches no module"):
        fuse(model, **{argument: ["layer1", "layer9.*"]})
    assert classes(model) == before


@every_model
def test_deepcopy(make):
    model, reference = pair(make)
    other = copy.deepcopy(model)
    assert classes(other) == classes(model)
    assert fusion_report(other) == fusion_report(model)
    before = copy.deepcopy(model.state_dict())
    assert_same_step(other, reference)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol):
    for make in (timm_preactivation, torchvision_frozen):
        model, reference = pair(make)
        other = pickle.loads(pickle.dumps(model, protocol))
        assert classes(other) == classes(model)
        assert_same_step(other, reference)


def in_a_fresh_process(script, directory):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (directory, ROOT, *filter(None, sys.path))))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    path = directory / "load.py"
    path.write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_whole_model_loads_in_a_fresh_process(tmp_path):
    """There nothing was fused yet, and no class of timm or torchvision has been met."""
    x, expected = images(64), {}
    for make in (timm_preactivation, torchvision_frozen):
        model, reference = pair(make)
        torch.save(model.eval(), tmp_path / f"{make.__name__}.pt")
        expected[make.__name__] = reference.eval()(x).detach()
    torch.save((x, expected), tmp_path / "expected.pt")
    script = """
        import torch
        torch.set_num_threads(1)
        x, expected = torch.load("expected.pt")
        for name, output in expected.items():
            model = torch.load(f"{name}.pt", weights_only=False)
            # Before anything of resnet_fused is called.
            torch.testing.assert_close(model(x), output, rtol=1e-9, atol=1e-9)
            graph = torch.export.export(model, (x,)).graph
            print(name, sum("resnet_fused" in str(node.target) for node in graph.nodes))
            from resnet_fused import fusion_report
            report = fusion_report(model)
            print(report.fused, report.total)
    """
    printed = in_a_fresh_process(script, tmp_path).split("\n")
    assert printed[:2] == ["timm_preactivation 10", "10 10"]
    assert printed[2:4] == ["torchvision_frozen 5", "6 6"]


BLOCK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        {body}
"""
FIRST = "return torch.relu(self.bn(self.conv(x)) + x)"


def test_a_class_that_changed_or_has_no_source_any_more(tmp_path, monkeypatch):
    """It is fused from the source that it has where it is loaded, and unfused where that cannot be."""
    bodies = {
        "block_edited": "return torch.relu(self.bn(self.conv(x)) - x) + 1",
        "block_unread": "locals(); return torch.relu(self.bn(self.conv(x)) + 2 * x)",
        "block_gone": FIRST,
    }
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    try:
        for name, body in bodies.items():
            path = tmp_path / f"{name}.py"
            path.write_text(BLOCK.format(body=FIRST))
            model = randomized(__import__(name).Block())
            fuse(model)
            assert_all_fused(model)
            torch.save(model.eval(), tmp_path / f"{name}.pt")
            path.write_text(BLOCK.format(body=body))
            if name == "block_gone":
                py_compile.compile(str(path), cfile=str(tmp_path / "block_gone.pyc"))
                path.unlink()
    finally:
        for name in bodies:
            sys.modules.pop(name, None)
    script = """
        import sys, torch
        from resnet_fused import fusion_report, unfuse
        x = torch.randn(2, 3, 5, 5)
        for name in ("block_edited", "block_unread", "block_gone"):
            model = torch.load(f"{name}.pt", weights_only=False)
            plain = sys.modules[name].Block()
            plain.load_state_dict(model.state_dict())
            torch.testing.assert_close(model(x), plain.eval()(x))
            row = fusion_report(model).rows[0]
            print(type(model) is type(plain), row.fused, row.operator, row.reason)
    """
    edited, unread, gone = in_a_fresh_process(script, tmp_path).strip().split("\n")
    # What is subtracted is no add, so the BatchNorm is by itself there.
    assert edited.startswith("False True batch_norm ")
    assert unread.startswith("True False None ")
    assert "locals" in unread
    assert gone.startswith("True False None ")
    assert "source" in gone


# Averages of weights


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(use_buffers):
    model, reference = pair(timm_basic)
    averages = []
    for m in (model, reference):
        average = torch.optim.swa_utils.AveragedModel(
            m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
        )
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        for seed in range(2):
            step(m, {"_x": images(64, generator=torch.Generator().manual_seed(seed))}, True, seed)
            optimizer.step()
            average.update_parameters(m)
        averages.append(average)
    assert_all_fused(averages[0])
    assert_all_close(tensors(averages[0].state_dict()), tensors(averages[1].state_dict()), "average")
    assert_same_step(averages[0].eval(), averages[1].eval())


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_averaged_model_of_timm(version):
    from timm import utils

    model, reference = pair(timm_preactivation)
    averages = []
    for m in (model, reference):
        average = getattr(utils, version)(m, decay=0.9)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        for seed in range(2):
            step(m, {"_x": images(64, generator=torch.Generator().manual_seed(seed))}, True, seed)
            optimizer.step()
            average.update(m)
        averages.append(average)
    assert_all_fused(averages[0].module)
    assert_all_close(tensors(averages[0].state_dict()), tensors(averages[1].state_dict()), "average")
    assert_same_step(averages[0].module, averages[1].module)


# Checkpointing


@pytest.mark.parametrize("make", [timm_bottleneck, timm_preactivation], ids=lambda make: make.__name__)
def test_checkpointing_of_timm_counts_a_batch_once(make):
    """Unfused torch counts twice (test_conversion_contracts.py); gradients are those without checkpointing."""
    model, reference = pair(make)
    model.set_grad_checkpointing()
    for _ in range(2):
        assert_same_step(model, reference)
    assert_all_fused(model)
    for mine, its in zip(model.buffers(), reference.buffers(), strict=True):
        assert mine.is_floating_point() or torch.equal(mine, its)


# Parametrizations and wrappers of convolutions


class LowRank(nn.Module):
    """A parametrization as for LoRA."""

    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight[0].numel(), dtype=weight.dtype) / 10)
        self.up = nn.Parameter(torch.randn(len(weight), 2, dtype=weight.dtype) / 10)

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


class LoRAConv2d(nn.Module):
    """A convolution with a low-rank one beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        options = {"stride": base.stride, "padding": base.padding, "bias": False, "dtype": base.weight.dtype}
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, **options)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def convolutions(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def low_rank(model):
    for _, conv in convolutions(model):
        parametrize.register_parametrization(conv, "weight", LowRank(conv.weight))


def wrapped(model):
    for name, conv in convolutions(model):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, LoRAConv2d(conv))


def weight_norm(model):
    for _, conv in convolutions(model):
        parametrizations.weight_norm(conv)


def spectral_norm(model):
    for _, conv in convolutions(model):
        parametrizations.spectral_norm(conv)


def weight_norm_by_hook(model):
    for _, conv in convolutions(model):
        nn.utils.weight_norm(conv)


def spectral_norm_by_hook(model):
    for _, conv in convolutions(model):
        nn.utils.spectral_norm(conv)


# What another module gave may be in other hands too, and does not wait while a shortcut may run.
UNOWNED = {RELU: 3, ALONE: 3}
OWNED = {RELU: 3, ADD: 1, DUAL: 2}
# While a convolution with a hook runs nothing waits either, for the hook could look at it.
HOOKED = {RELU: 3, ADD: 1, ALONE: 2}
ON_CONVOLUTIONS = {
    **dict.fromkeys((low_rank, weight_norm, spectral_norm), OWNED),
    **dict.fromkeys((weight_norm_by_hook, spectral_norm_by_hook), HOOKED),
    wrapped: UNOWNED,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", ON_CONVOLUTIONS, ids=lambda change: change.__name__)
def test_convolutions_changed(change, when, monkeypatch):
    reference = randomized(torchvision_basic().double())
    model = copy.deepcopy(reference)
    if when != "before":
        fuse(model)
    for m in (model, reference):
        torch.manual_seed(7)
        change(m)
    if when == "before":
        fuse(model)
    compare(monkeypatch, model, reference, images(64), ON_CONVOLUTIONS[change])


def assert_same_before_a_report(monkeypatch, model, reference):
    """A report may not change what runs."""
    x = images(64)
    ran = []
    for _ in range(2):
        with Recorder(model, monkeypatch) as recorder:
            assert_same_step(model, reference, x)
        ran.append({name: dict(counts) for name, counts in recorder.ran.items()})
        said = {row.name: {row.operator: 1} for row in fusion_report(model).rows if row.fused}
    assert ran[1] == said
    assert ran[0] == said


@pytest.mark.parametrize("change", [low_rank, weight_norm, spectral_norm], ids=lambda change: change.__name__)
def test_convolutions_changed_after_fuse_run_as_reported(change, monkeypatch):
    model, reference = pair(torchvision_basic)
    for m in (model, reference):
        torch.manual_seed(7)
        change(m)
    assert_same_before_a_report(monkeypatch, model, reference)


@pytest.mark.parametrize("make", [torchvision_basic, timm_preactivation], ids=lambda make: make.__name__)
def test_batch_norms_frozen_after_fuse_run_as_reported(make, monkeypatch):
    model, reference = pair(make)
    for m in (model, reference):
        timm.layers.freeze_batch_norm_2d(m)
    for cls in classes(reference):
        if cls.__name__.startswith("Frozen") and kinds.MEMORY in vars(cls):
            # Other tests may have met it.
            monkeypatch.delattr(cls, kinds.MEMORY)
    assert_same_before_a_report(monkeypatch, model, reference)


# Freezing


def freeze_by_hand(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.requires_grad_(False)


def freeze_some(model):
    model.bn1.eval()
    model.layer2[0].downsample[1].eval()
    model.layer1.requires_grad_(False)


def freeze_by_timm(model):
    from timm.utils.model import freeze

    freeze(model, ["bn1", "layer1"])


def freeze_batch_norms_by_timm(model):
    timm.layers.freeze_batch_norm_2d(model)


FREEZING = {
    freeze_by_hand: {RELU: 3, ADD: 1, DUAL: 2},
    # One operator cannot run in two modes.
    freeze_some: {RELU: 3, ADD: 2, ALONE: 1},
    freeze_by_timm: {RELU: 3, ADD: 1, DUAL: 2},
    freeze_batch_norms_by_timm: {RELU: 3, ADD: 1, DUAL: 2},
}


class Frozen(nn.Module):
    """Stays in the mode that its parts have, as detection models see to it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)

    def train(self, mode=True):
        return self


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("freeze", FREEZING, ids=lambda freeze: freeze.__name__)
def test_frozen_batch_norms(freeze, when, monkeypatch):
    reference = randomized(torchvision_basic().double())
    model = copy.deepcopy(reference)
    if when == "after":
        fuse(model)
    freeze(model)
    freeze(reference)
    if when == "before":
        fuse(model)
    model, reference = Frozen(model), Frozen(reference)
    compare(monkeypatch, model, reference, images(64), FREEZING[freeze], modes=(True, True))
    for (name, mine), its in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert mine.requires_grad == its.requires_grad, name
        assert (mine.grad is None) == (its.grad is None), name


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_frozen_by_torchvision(when):
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    resnet = torchvision.models.resnet
    reference = randomized(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]).double())
    model = copy.deepcopy(reference)
    if when == "after":
        fuse(model)
    torch.manual_seed(7)
    model = _resnet_fpn_extractor(model, trainable_layers=2).double()
    torch.manual_seed(7)
    reference = _resnet_fpn_extractor(reference, trainable_layers=2).double()
    if when == "before":
        fuse(model)
    report = fusion_report(model)
    # The stem belongs to the ResNet, of which a getter has only the parts: it finds them where fused after that.
    assert {row.name for row in report.rows if not row.fused} == (set() if when == "before" else {"body.bn1"})
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name, parameter in reference.named_parameters() if not parameter.requires_grad]
    assert "body.layer2.0.bn1.weight" in frozen
    assert "body.layer3.0.bn1.weight" not in frozen
    assert_same_step(model, reference)


def test_unfrozen_again(monkeypatch):
    reference = randomized(timm_preactivation().double())
    model = fuse(copy.deepcopy(reference))
    for change in (timm.layers.freeze_batch_norm_2d, timm.layers.unfreeze_batch_norm_2d):
        change(model)
        change(reference)
        compare(monkeypatch, model, reference, images(64), {RELU: 10}, modes=(True, False))


# Several processes


@pytest.mark.parametrize("when", ["before", "after"])
def test_sync_batch_norm_without_a_process_group(when, monkeypatch):
    reference = randomized(torchvision_basic().double())
    model = copy.deepcopy(reference)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    model = fuse(convert(model)) if when == "before" else convert(fuse(model))
    assert type(model.bn1) is nn.SyncBatchNorm
    compare(monkeypatch, model, reference, images(64), {RELU: 3, ADD: 1, DUAL: 2})
    assert {row.module for row in fusion_report(model).rows} == {"SyncBatchNorm"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_sync_batch_norm_of_timm(when, monkeypatch):
    reference = randomized(timm_preactivation().double())
    model = copy.deepcopy(reference)
    convert = timm.layers.convert_sync_batchnorm
    model = fuse(convert(model)) if when == "before" else convert(fuse(model))
    assert "SyncBatchNormAct" in {type(module).__name__ for module in model.modules()}
    compare(monkeypatch, model, reference, images(64), {RELU: 10})


@pytest.mark.usefixtures("_process_group")
def test_sync_batch_norm_with_a_process_group(monkeypatch):
    """In training it needs its own forward, which refuses CPU tensors; in evaluation nothing is synchronized."""
    reference = nn.SyncBatchNorm.convert_sync_batchnorm(randomized(torchvision_basic().double()))
    model = fuse(copy.deepcopy(reference))
    messages = []
    for m in (model, reference):
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on") as caught:
            m(images(64))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert fusion_report(model).fused == 0
    assert all("synchronizes" in reason for reason in reasons(model))
    compare(monkeypatch, model, reference, images(64), {RELU: 3, ADD: 1, DUAL: 2}, modes=(False,))


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("make", [timm_basic, torchvision_frozen], ids=lambda make: make.__name__)
def test_distributed_data_parallel_made_before(make, monkeypatch):
    reference = randomized(make().double())
    wrapper = nn.parallel.DistributedDataParallel(copy.deepcopy(reference))
    assert fuse(wrapper) is wrapper
    assert type(wrapper) is nn.parallel.DistributedDataParallel
    assert_all_fused(wrapper)
    for _ in range(2):
        assert_same_step(wrapper, reference)


def fully_sharded(model):
    from torch.distributed.fsdp import fully_shard

    for block in [*model.layer1, *model.layer2]:
        fully_shard(block)
    return fully_shard(model)


@pytest.mark.usefixtures("_process_group")
def test_fully_sharded_models_run_as_reported(monkeypatch):
    """fully_shard changes the classes of modules to subclasses."""
    model, reference = pair(torchvision_basic)
    fully_sharded(model)
    assert type(model).__name__.startswith("FSDP")
    x = images(64)
    with Recorder(model, monkeypatch) as recorder:
        output = model(x)
        output.sum().backward()
    assert_all_close([output], [reference(x)], "output")
    said = {row.name: {row.operator: 1} for row in fusion_report(model).rows if row.fused}
    assert {name: dict(counts) for name, counts in recorder.ran.items()} == said
    assert len(said) == 6


@pytest.mark.usefixtures("_process_group")
def test_fuse_leaves_sharded_modules_as_they_are():
    model = fully_sharded(fuse(torchvision_basic()))
    before = classes(model)
    fuse(model)
    assert classes(model) == before
    for change in (unfuse, lambda m: fuse(m, recompute=True), lambda m: fuse(m, exclude="layer1")):
        with pytest.raises(TypeError, match="was changed to FSDP"):
            change(model)
        assert classes(model) == before
    sharded = fully_sharded(torchvision_basic())
    assert "torch made FSDPResNet of ResNet: fuse before that" in " ".join(reasons(fuse(sharded)))


class Scaled(nn.Module):
    """A block with a parameter of its own, which a parametrization makes a property of the class."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x) * self.scale


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_block_runs_as_reported(monkeypatch):
    model, reference = pair(Scaled)
    for m in (model, reference):
        parametrize.register_parametrization(m, "scale", Doubled())
    assert type(model).__name__ == "ParametrizedScaled"
    compare(monkeypatch, model, reference, images(8), {ADD: 1})


def test_subclasses_of_a_fused_class_run_as_reported(monkeypatch):
    """One with a forward of its own is not bypassed; a copy keeps its class."""
    model, reference = (nn.Sequential(m, nn.ReLU()) for m in pair(Scaled))
    fuse(model)
    cls = type(model[0])
    model[0].__class__ = type("Kept", (cls,), {"extra": 1})
    compare(monkeypatch, model, reference, images(8), {ADD: 1})
    assert type(copy.deepcopy(model)[0]) is type(model[0])
    for m in (model, reference):
        base = type(m[0])
        forward = lambda self, x: -self.scale * torch.relu(self.bn(self.conv(x)))  # noqa: E731
        m[0].__class__ = type("Negated", (base,), {"forward": forward})
    x = images(8)
    assert_all_close([model(x)], [reference(x)], "output")
    assert reasons(model) == ["Negated is not read: its forward is another one in the class Negated"]


# Optimizers


@every_model
def test_filters_of_weight_decay_give_the_same_groups(make):
    from timm.optim import param_groups_weight_decay

    model = make()

    def groups():
        by_timm = param_groups_weight_decay(model, 0.1)
        by_class = [
            parameter
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for parameter in module.parameters(recurse=False)
        ]
        by_name = [p for name, p in model.named_parameters() if re.search(r"(bn|norm|downsample\.\d)", name)]
        by_type = [type(module).__name__ for module in model.modules()]
        found = [group["params"] for group in by_timm] + [by_class, by_name]
        return [[id(parameter) for parameter in group] for group in found], by_type

    before = groups()
    assert sum(map(len, before[0])) > len(list(model.parameters()))
    fuse(model)
    assert groups() == before


# Compilers and graphs


def test_a_compiled_model_is_refused():
    model = torch.compile(timm_basic(), backend="eager")
    with pytest.raises(TypeError, match=re.escape("torch.compile(fuse(model))")):
        fuse(model)


@pytest.mark.parametrize("make", MODELS[:1] + MODELS[2:], ids=lambda make: make.__name__)
def test_compile_as_one_graph(make):
    model, reference = pair(make)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(64)
    for _ in range(2):
        assert_same_step(compiled, reference, x)
    for m in (model, reference):
        m.eval()
    with torch.no_grad():
        assert_all_close([compiled(x)], [reference(x)], "evaluation")


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, reference = pair(timm_basic)
    x = images(64)
    exported = torch.export.export(model.eval(), (x,), strict=strict)
    assert_all_close([exported.module()(x)], [reference.eval()(x)], "exported")
    targets = [str(node.target) for node in exported.graph.nodes]
    # Two BatchNorms run in one operator where both end a block.
    assert sum("resnet_fused" in target for target in targets) == 7 + 8 // 2
    assert not any("batch_norm." in target and "resnet_fused" not in target for target in targets)


def test_symbolic_trace():
    reference = torchvision.models.resnet18()
    graphs = [torch.fx.symbolic_trace(m).graph for m in (reference, fuse(copy.deepcopy(reference)))]
    assert len(graphs[0].nodes) > 60
    assert [n.format_node() for n in graphs[0].nodes] == [n.format_node() for n in graphs[1].nodes]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [timm_preactivation, torchvision_basic], ids=lambda make: make.__name__)
def test_trace(make):
    model, reference = pair(make)
    x = images(64)
    traced = [torch.jit.trace(m.eval(), x) for m in (model, reference)]
    nodes = [collections.Counter(node.kind() for node in trace.inlined_graph.nodes()) for trace in traced]
    assert nodes[0] == nodes[1]
    assert nodes[0]["aten::batch_norm"] == fusion_report(model).total
    assert_all_close([traced[0](x)], [reference(x)], "traced")


def test_feature_extractors_of_torchvision():
    from torchvision.models.feature_extraction import create_feature_extractor

    model, reference = pair(torchvision_basic)
    x = images(64)
    nodes = ["bn1", "layer1.0.bn1", "layer2.0.relu_1"]
    outputs = [create_feature_extractor(m.eval(), nodes)(x) for m in (model, reference)]
    assert list(outputs[0]) == nodes
    assert_all_close(*([output[node] for node in nodes] for output in outputs), "feature")
    layers = {"layer1": "0", "layer2": "1"}
    outputs = [torchvision.models._utils.IntermediateLayerGetter(m, layers)(x) for m in (model, reference)]
    assert_all_close(*(list(output.values()) for output in outputs), "feature")


@pytest.mark.parametrize("make", [timm_basic, timm_preactivation], ids=lambda make: make.__name__)
def test_intermediates_of_timm(make, monkeypatch):
    model, reference = pair(make)
    x = images(64)
    with Recorder(model, monkeypatch) as recorder:
        mine = model.forward_intermediates(x)
    # Methods beside forward are rewritten too.
    assert sum(counts.total() for counts in recorder.ran.values()) == fusion_report(model).total
    assert not any(operator == ALONE for counts in recorder.ran.values() for operator in counts)
    assert_all_close(tensors(mine), tensors(reference.forward_intermediates(x)), "intermediate")
    for m in (model, reference):
        m.eval()
    pruned = [
        m.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True) for m in (model, reference)
    ]
    assert_all_close(tensors(pruned[0]), tensors(pruned[1]), "intermediate")


@pytest.mark.parametrize(
    ("make", "extractor"),
    [
        (timm_bottleneck, "FeatureGetterNet"),
        (timm_bottleneck, "FeatureListNet"),
        (timm_preactivation, "FeatureGetterNet"),
        (timm_preactivation, "FeatureHookNet"),
    ],
)
def test_feature_extractors_of_timm(make, extractor):
    """They call forward_intermediates(), its parts one after another, or hook its parts."""
    from timm.models import _features

    extractor = getattr(_features, extractor)
    model, reference = pair(make)
    x = images(64)
    outputs = [extractor(m, out_indices=[1, 2])(x) for m in (model, reference)]
    assert len(outputs[0]) == 2
    assert_all_close(*outputs, "feature")
    assert_same_step(model, reference)


# The meta device, dtypes, memory formats


@every_model
def test_a_model_on_the_meta_device(make):
    reference = randomized(make().double())
    with torch.device("meta"):
        model = make().double()
    fuse(model)
    report = fusion_report(model)
    assert report.fused == 0
    assert all("meta" in row.reason for row in report.rows)
    assert fusion_report(model, device="cpu").fused == report.total
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict())
    assert_all_fused(model)
    # Buffers that are in no state_dict would be empty.
    assert_same_step(model, reference)


@pytest.mark.parametrize("make", [timm_basic, timm_preactivation, torchvision_frozen], ids=lambda make: make.__name__)
def test_autocast_gives_the_dtypes_that_eager_has(make):
    model, reference = (m.float() for m in pair(make))
    x = images(64).float()
    dtypes = []
    for m in (model, reference):
        seen = []
        for module in m.modules():
            if type(module).__name__ in ("BasicBlock", "PreActBottleneck", "PreActBasic") or module is m:
                module.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output.dtype))
        for training in (True, False):
            m.train(training)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = m(x)
            output.float().sum().backward()
        dtypes.append((seen, [p.grad.dtype for p in m.parameters()], [b.dtype for b in m.buffers()]))
    assert dtypes[0] == dtypes[1]
    assert len(dtypes[0][0]) >= 4
    assert torch.bfloat16 in dtypes[0][0]


@every_model
def test_channels_last(make):
    """In float32, which convolutions keep in this format."""
    reference = randomized(make()).to(memory_format=torch.channels_last)
    model = fuse(copy.deepcopy(reference))
    x = images(64).float().contiguous(memory_format=torch.channels_last)
    strides = []
    for m in (model, reference):
        seen = []
        for name, module in m.named_modules():
            # Only these are called both fused and unfused.
            if isinstance(module, nn.Sequential | nn.ModuleList) or "Block" in type(module).__name__ or not name:
                module.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(strides_of(output)))
        for training in (True, False):
            m.train(training)(x)
        strides.append(seen)
    assert strides[0] == strides[1]
    assert len(strides[0]) > 4


def strides_of(output):
    return [tensor.stride() for tensor in tensors(output)]


# Recomputation


@pytest.mark.parametrize("make", [timm_bottleneck, Classifier], ids=lambda make: make.__name__)
def test_recomputation_keeps_less_and_gives_the_same_bits(make):
    reference = randomized(make().double())
    x, kept, gradients = images(64), [], []
    for recompute in (False, True, "convolutions"):
        model = fuse(copy.deepcopy(reference), recompute=recompute)
        leaf = x.clone().requires_grad_()
        with SavedActivations(model) as saved:
            output = model(leaf)
        output.square().sum().backward()
        kept.append(saved.bytes)
        gradients.append([leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        recomputed = sum(row.recompute for row in fusion_report(model).rows)
        assert (recomputed > 0) == bool(recompute)
    assert kept[0] > kept[1] > kept[2]
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, gradients[0], strict=True))


# Threads


@every_model
def test_two_threads_in_evaluation(make):
    model, reference = pair(make)
    inputs = [images(64), images(64)]
    with torch.no_grad():
        expected = [reference.eval()(x) for x in inputs]
        model.eval()
    barrier, outputs = threading.Barrier(2), [[], []]

    def run(index):
        barrier.wait()
        with torch.no_grad():
            outputs[index] += [model(inputs[index]) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, its in zip(outputs, expected, strict=True):
        assert len(mine) == 3
        for output in mine:
            assert_all_close([output], [its], "output")
