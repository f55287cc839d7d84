"""fuse() on models as their packages make them: small members of every family, with random weights.

Each is compared with an unfused copy, and what :func:`fusion_report` says of each BatchNorm with what really ran.
"""

import collections
import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from resnet_fused import fuse, fusion_report, modules, unfuse

ALONE = "batch_norm"
RELU = "batch_norm+relu"
ADD = "batch_norm+add+relu"
DUAL = "batch_norm+batch_norm+add+relu"


pytestmark = pytest.mark.usefixtures("one_thread")


def package(name):
    return pytest.importorskip(name)


def is_batch_norm(module):
    return "BatchNorm" in type(module).__name__ or isinstance(module, nn.modules.batchnorm._BatchNorm)


def randomized(model):
    """Statistics and affine parameters of BatchNorms as after some training: nothing at 0 or 1, where errors hide."""
    generator = torch.Generator().manual_seed(1)
    for module in filter(is_batch_norm, model.modules()):
        for name, low, high in (("weight", 0.5, 1.5), ("running_var", 0.5, 1.5)):
            tensor = getattr(module, name, None)
            if tensor is not None:
                tensor.data.uniform_(low, high, generator=generator)
        for name in ("bias", "running_mean"):
            tensor = getattr(module, name, None)
            if tensor is not None:
                tensor.data.normal_(0, 0.2, generator=generator)
    return model


class Recorder:
    """What ran: for each BatchNorm, by name, how often as part of which operator."""

    def __init__(self, model, monkeypatch):
        self.model = model
        self.monkeypatch = monkeypatch
        self.ran = collections.defaultdict(collections.Counter)
        # For a frozen BatchNorm an adapter stands, which holds the very tensors.
        self.names = {}
        for name, module in model.named_modules():
            if is_batch_norm(module):
                self.names[id(module)] = name
                if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                    self.names[id(module.weight)] = name

    def name(self, norm):
        return self.names[id(norm)] if id(norm) in self.names else self.names[id(norm.weight)]

    def __enter__(self):
        single, dual = modules.batch_norm_add_relu, modules.dual_batch_norm_add_relu

        def record_single(bn, input, residual=None, relu=True):
            operator = (ALONE if residual is None else "batch_norm+add") + ("+relu" if relu else "")
            self.ran[self.name(bn)][operator] += 1
            return single(bn, input, residual, relu)

        def record_dual(bn, input, bn2, input2, relu=True):
            if modules.can_join(bn, bn2):  # otherwise it calls the other function, once for each
                for norm in (bn, bn2):
                    self.ran[self.name(norm)][DUAL if relu else "no operator"] += 1
            return dual(bn, input, bn2, input2, relu)

        self.monkeypatch.setattr(modules, "batch_norm_add_relu", record_single)
        self.monkeypatch.setattr(modules, "dual_batch_norm_add_relu", record_dual)
        return self

    def __exit__(self, *_):
        self.monkeypatch.undo()


def count_calls(model):
    """How often each BatchNorm is called, unfused."""
    calls = collections.Counter()
    for name, module in model.named_modules():
        if is_batch_norm(module):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def tensors(output):
    return [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def assert_close(mine, its, scale, what):
    """Both computed in float64, where one rounding is 1.1e-16 of a value.

    A sum of n terms adds sqrt(n) of these, n up to 1e4 here, and each of the up to a hundred normalizations amplifies
    what came before by up to 1 / sqrt(var) of a channel that has as few as 8 values: 1e-12 of the largest value are
    seen, and 1e-9 allowed. Gradients that cancel (of a bias before a BatchNorm) are rounding errors of the others,
    hence the scale of all of a kind. An error in a formula is at least 1 / (N H W) > 1e-5 of one of them.
    """
    assert mine.shape == its.shape
    assert mine.dtype == its.dtype
    assert mine.stride() == its.stride(), what
    error = (mine - its).abs().max().item() if mine.numel() else 0.0
    assert error <= 1e-9 * scale, f"{what}: {error} of {scale}"


def assert_all_close(mine, its, what):
    assert len(mine) == len(its)
    scale = max((x.abs().max().item() for x in its if x.numel()), default=0.0)
    for index, (a, b) in enumerate(zip(mine, its, strict=True)):
        assert_close(a, b, max(scale, 1e-3), f"{what} {index}")


def step(model, inputs, gradients, seed):
    """Output, and gradients of inputs and parameters, of one call."""
    leaves = {k: v.clone().requires_grad_(gradients and v.is_floating_point()) for k, v in inputs.items()}
    # Not the leaves, which may not be written to.
    arguments = {k: v * 1 if v.requires_grad else v for k, v in leaves.items()}
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.set_grad_enabled(gradients):
        named = {k: v for k, v in arguments.items() if not k.startswith("_")}
        output = tensors(model(*(v for k, v in arguments.items() if k.startswith("_")), **named))
    assert output
    if not gradients:
        return output, [], []
    generator = torch.Generator().manual_seed(seed)
    loss = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in output if x.requires_grad)
    loss.backward()
    parameters = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    given = [x.grad for x in leaves.values() if x.grad is not None]
    return [x.detach() for x in output], given, parameters


def check(monkeypatch, model, inputs, operators, evaluation=None, gradients=True, modes=(True, True, False)):
    """Compares a model with its fused copy, as :func:`compare` does; returns the copy, in the last mode."""
    reference = randomized(model.double())
    model = fuse(copy.deepcopy(reference))
    compare(monkeypatch, model, reference, inputs, operators, evaluation, gradients, modes)
    return model


def compare(
    monkeypatch, model, reference, inputs, operators, evaluation=None, gradients=True, modes=(True, True, False)
):
    """Compares a fused model with an unfused one, and the report with what runs.

    Args:
        inputs: a tensor or a dict of tensors.
        operators: how many BatchNorms the report says run in which operator in training, those under None not fused.
        evaluation: the same in evaluation where it differs.
        modes: the modes to run in, one after another.
    """
    inputs = inputs if isinstance(inputs, dict) else {"_x": inputs}
    calls = count_calls(reference)
    for seed, training in enumerate(modes):
        for m in (model, reference):
            m.train(training)
        report = fusion_report(model)
        expected = operators if training or evaluation is None else evaluation
        assert dict(collections.Counter(row.operator for row in report.rows)) == expected
        assert report.fused == sum(n for operator, n in expected.items() if operator is not None)
        assert all(row.fused == (row.operator is not None) for row in report.rows)
        assert all(row.reason for row in report.rows if row.operator in (None, ALONE))
        calls.clear()
        what = f"step {seed} in {'training' if training else 'evaluation'}"
        its = step(reference, inputs, gradients, seed)
        with Recorder(model, monkeypatch) as recorder:
            mine = step(model, inputs, gradients, seed)
        for kind, a, b in zip(("output", "gradient of input", "gradient of parameter"), mine, its, strict=True):
            assert_all_close(a, b, f"{what}, {kind}")
        assert_report_is_true(report, recorder.ran, calls)
        buffers = [tensors(dict(m.named_buffers())) for m in (model, reference)]
        assert_all_close(*buffers, f"{what}, buffer")
        for a, b in zip(model.buffers(), reference.buffers(), strict=True):
            assert a.is_floating_point() or torch.equal(a, b)
    assert list(model.state_dict()) == list(reference.state_dict())


def assert_report_is_true(report, ran, calls):
    said = {row.name: collections.Counter({row.operator: calls[row.name]}) for row in report.rows if row.fused}
    said = {name: counts for name, counts in said.items() if counts.total()}  # no part of this mode: auxiliary heads
    assert {name: dict(counts) for name, counts in ran.items()} == {name: dict(counts) for name, counts in said.items()}


def reasons(model):
    return [row.reason for row in fusion_report(model).rows]


def images(size=32, batch=2, channels=3, **options):
    return torch.randn(batch, channels, size, size, dtype=torch.float64, **options)


class TestTorchvision:
    @pytest.fixture
    def models(self):
        return package("torchvision").models

    @pytest.fixture
    def frozen(self):
        return package("torchvision").ops.FrozenBatchNorm2d

    def test_resnet(self, models, monkeypatch):
        model = models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
        check(monkeypatch, model, images(64), {RELU: 5, ADD: 1, DUAL: 6})

    def test_resnext(self, models, monkeypatch):
        options = {"groups": 4, "width_per_group": 4, "num_classes": 3}
        model = models.resnet.ResNet(models.resnet.Bottleneck, [2, 1, 1, 1], **options)
        check(monkeypatch, model, images(64), {RELU: 11, ADD: 1, DUAL: 8})

    @pytest.mark.parametrize("head", ["_deeplabv3_resnet", "_fcn_resnet"])
    def test_segmentation(self, models, monkeypatch, head):
        backbone = models.resnet.ResNet(
            models.resnet.Bottleneck,
            [1, 1, 1, 1],
            width_per_group=4,
            replace_stride_with_dilation=[False, True, True],
        )
        module = getattr(models.segmentation, "deeplabv3" if "deeplab" in head else "fcn")
        model = getattr(module, head)(backbone, 3, True)
        check(monkeypatch, model, images(), {RELU: 17 if "deeplab" in head else 11, DUAL: 8})

    def test_lraspp(self, models, monkeypatch):
        segmentation = models.segmentation
        model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
        fused = check(monkeypatch, model, images(64), {RELU: 12, None: 35}, modes=(True, False))
        assert sum("Hardswish" in (reason or "") for reason in reasons(fused)) >= 20

    def test_detection_backbone_with_frozen_batch_norm(self, models, frozen, monkeypatch):
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        model = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=frozen, trainable_layers=5)
        check(monkeypatch, model, images(64), {RELU: 9, ADD: 5, DUAL: 6}, modes=(True, False))

    def test_frozen_batch_norm_of_another_dtype_is_called(self, models, frozen, monkeypatch):
        """It computes in the wider dtype of input and buffers, which no operator does."""
        model = models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=frozen, num_classes=3)
        reference = randomized(model)
        reference.layer1[0].bn1.running_var = reference.layer1[0].bn1.running_var.bfloat16()
        model = fuse(copy.deepcopy(reference))
        report = fusion_report(model)
        assert [row.name for row in report.rows if not row.fused] == ["layer1.0.bn1"]
        assert "dtype" in next(row.reason for row in report.rows if not row.fused)
        x = images().float()
        with Recorder(model, monkeypatch) as recorder:
            output = model(x)
        assert "layer1.0.bn1" not in recorder.ran
        assert sum(counts.total() for counts in recorder.ran.values()) == 11
        # In float32: a rounding of 6e-8 that twelve layers may amplify ten-fold each two.
        torch.testing.assert_close(output, reference(x), rtol=1e-3, atol=1e-4)

    def test_frozen_batch_norm_in_float32_with_values_in_bfloat16(self, models, frozen, monkeypatch):
        """Convolutions in bfloat16 and buffers in float32: unfused torch gives float32 from the first of them on."""
        reference = nn.Sequential(nn.Conv2d(3, 4, 3), frozen(4), nn.ReLU())
        randomized(reference)[0].bfloat16()
        model = fuse(copy.deepcopy(reference))
        x = images().bfloat16()
        with Recorder(model, monkeypatch) as recorder:
            output = model(x)
        assert not recorder.ran
        assert output.dtype == reference(x).dtype == torch.float32
        assert torch.equal(output, reference(x))

    def test_retinanet_in_evaluation(self, models, frozen, monkeypatch):
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=frozen)
        retinanet = models.detection.RetinaNet
        model = retinanet(backbone, 3, min_size=64, max_size=64, score_thresh=0.0, detections_per_img=5)

        class Boxes(nn.Module):
            """Takes a tensor and gives tensors."""

            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                return [[found["boxes"], found["scores"]] for found in self.model(list(x))]

        check(monkeypatch, Boxes(), images(64), {RELU: 9, ADD: 5, DUAL: 6}, gradients=False, modes=(False,))

    def test_vgg(self, models, monkeypatch):
        features = models.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True)
        check(monkeypatch, features, images(), {RELU: 3})

    def test_googlenet(self, models, monkeypatch):
        model = models.googlenet(weights=None, num_classes=3, init_weights=False, aux_logits=True)
        check(monkeypatch, model, images(64), {RELU: 59}, modes=(True, False))

    @pytest.mark.parametrize("name", ["InceptionA", "InceptionB", "InceptionC", "InceptionE"])
    def test_inception(self, models, monkeypatch, name):
        arguments = {"InceptionA": (16, 8), "InceptionB": (16,), "InceptionC": (16, 8), "InceptionE": (16,)}[name]
        model = getattr(models.inception, name)(*arguments)
        count = {"InceptionA": 7, "InceptionB": 4, "InceptionC": 10, "InceptionE": 9}[name]
        check(monkeypatch, model, images(9, channels=16), {RELU: count})

    @pytest.mark.parametrize("se_ratio", [None, 0.25], ids=["x", "y"])
    def test_regnet(self, models, monkeypatch, se_ratio):
        parameters = models.regnet.BlockParams.from_init_params(6, 16, 20.0, 2.5, 8, se_ratio=se_ratio)
        model = models.regnet.RegNet(parameters, num_classes=3, stem_width=8)
        blocks, stages = sum(parameters.depths), len(parameters.depths)
        assert (blocks, stages) == (6, 3)
        check(monkeypatch, model, images(64), {RELU: 13, ADD: 3, DUAL: 6})

    def test_densenet(self, models, monkeypatch):
        model = models.DenseNet(8, (2, 2), 16, num_classes=3)
        check(monkeypatch, model, images(), {RELU: 11})
        checkpointed = models.DenseNet(8, (2, 2), 16, num_classes=3, memory_efficient=True)
        report = fusion_report(fuse(checkpointed))
        assert report.fused == 11

    def test_mobilenet_v2(self, models, monkeypatch):
        setting = [[1, 8, 1, 1], [2, 16, 2, 2]]
        model = models.MobileNetV2(num_classes=3, inverted_residual_setting=setting)
        fused = check(monkeypatch, model, images(), {None: 10})
        assert sum("ReLU6" in reason for reason in reasons(fused)) == 7

    def test_shufflenet_and_mnasnet(self, models, monkeypatch):
        model = models.ShuffleNetV2([1, 2, 1], [8, 16, 24, 32, 32], num_classes=3)
        check(monkeypatch, model, images(64), {RELU: 13, ALONE: 7})
        check(monkeypatch, models.MNASNet(0.2, 3), images(64), {RELU: 35, ALONE: 17}, modes=(True, False))

    def test_video(self, models, monkeypatch):
        """3-D convolutions, and blocks whose convolutions are a Sequential with a BatchNorm inside."""
        video = models.video.resnet
        options = {"block": video.BasicBlock, "conv_makers": [video.Conv2Plus1D] * 4, "layers": [1, 1, 1, 1]}
        model = video.VideoResNet(stem=video.R2Plus1dStem, num_classes=3, **options)
        model.layer3, model.layer4 = nn.Identity(), nn.Identity()
        model.fc = nn.Linear(128, 3)
        x = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)
        check(monkeypatch, model, x, {RELU: 8, ADD: 1, DUAL: 2}, modes=(True, False))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    @pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
    def test_quantizable_models_are_refused(self, models, monkeypatch, name):
        model = getattr(models.quantization, name)(weights=None)
        classes = [type(module) for module in model.modules()]
        fuse(model)
        assert [type(module) for module in model.modules()] == classes
        report = fusion_report(model)
        assert report.fused == 0
        assert report.total > 0
        assert all("quantization" in row.reason for row in report.rows)


def timm_model(name, **options):
    return package("timm").create_model(name, num_classes=3, **options)


def timm_resnet(block="BasicBlock", layers=(1, 1, 1, 1), **options):
    """A ResNet of timm with narrow stages."""
    resnet = package("timm").models.resnet
    options = {"num_classes": 3, "channels": (8, 16, 24, 32), "stem_width": 8} | options
    return resnet.ResNet(getattr(resnet, block), layers, **options)


TIMM_NAMED = {
    "resnet10t": {RELU: 7, ADD: 1, DUAL: 6},
    "resnet14t": {RELU: 11, DUAL: 8},
    "resnet26d": {RELU: 19, ADD: 4, DUAL: 8},
    "resnet26t": {RELU: 19, ADD: 4, DUAL: 8},
}
TIMM_SMALL = {
    "basic": ({"layers": (2, 1, 1, 1)}, {RELU: 6, ADD: 1, DUAL: 8}),
    "bottleneck": ({"block": "Bottleneck", "layers": (2, 1, 1, 1)}, {RELU: 11, ADD: 1, DUAL: 8}),
    "resnext": ({"block": "Bottleneck", "cardinality": 4, "base_width": 8}, {RELU: 9, DUAL: 8}),
    "wide": ({"block": "Bottleneck", "base_width": 128}, {RELU: 9, DUAL: 8}),
    "tiered stem, average shortcut": (
        {"stem_type": "deep_tiered", "avg_down": True, "replace_stem_pool": True},
        {RELU: 8, DUAL: 8},
    ),
    "squeeze and excitation": ({"block_args": {"attn_layer": "se"}}, {RELU: 5, ALONE: 8}),
    "eca, bottleneck": ({"block": "Bottleneck", "block_args": {"attn_layer": "eca"}}, {RELU: 9, ALONE: 8}),
    "other activation": ({"act_layer": nn.SiLU}, {None: 13}),
    "dilated": ({"block": "Bottleneck", "output_stride": 8}, {RELU: 9, DUAL: 8}),
}


class TestTimm:
    @pytest.mark.parametrize("name", TIMM_NAMED)
    def test_named(self, monkeypatch, name):
        check(monkeypatch, timm_model(name), images(64), TIMM_NAMED[name], modes=(True, False))

    @pytest.mark.parametrize("case", TIMM_SMALL)
    def test_small(self, monkeypatch, case):
        options, operators = TIMM_SMALL[case]
        check(monkeypatch, timm_resnet(**options), images(64), operators)

    def test_anti_aliased(self, monkeypatch):
        layers = package("timm").layers
        model = timm_resnet("Bottleneck", aa_layer=layers.BlurPool2d, stem_width=8)
        check(monkeypatch, model, images(64), {RELU: 9, DUAL: 8})
        check(monkeypatch, timm_resnet(aa_layer=nn.AvgPool2d), images(64), {RELU: 5, DUAL: 8})

    def test_drop_path_and_drop_block_are_active_in_training(self, monkeypatch):
        """The same seed draws the same: a module left out or called twice would shift what the others draw."""
        options = {"drop_path_rate": 0.3, "drop_block_rate": 0.1, "layers": (2, 1, 1, 1)}
        # All but the first block end in DropPath; in the last two layers DropBlock is before the first ReLU too.
        model = check(
            monkeypatch,
            timm_resnet(**options),
            images(64, batch=4),
            operators={RELU: 4, DUAL: 2, ALONE: 9},
            evaluation={RELU: 6, ADD: 1, DUAL: 8},
        )
        model.train()
        said = [reason for reason in reasons(model) if reason is not None]
        assert any("DropPath" in reason for reason in said)
        assert any("DropBlock" in reason for reason in said)

    def test_resnetv2(self, monkeypatch):
        """Pre-activation: BatchNormAct2d, which has its ReLU inside."""
        resnetv2 = package("timm").models.resnetv2
        layers = package("timm").layers
        options = {
            "num_classes": 3,
            "channels": (8, 16, 24),
            "stem_chs": 8,
            "norm_layer": layers.BatchNormAct2d,
            "conv_layer": layers.create_conv2d,
        }
        model = resnetv2.ResNetV2((2, 1, 1), **options)
        check(monkeypatch, model, images(64), {RELU: 13})
        model = resnetv2.ResNetV2((1, 1, 1), **options, preact=False)
        operators = {RELU: 7, ADD: 0, DUAL: 6}
        check(monkeypatch, model, images(64), {k: v for k, v in operators.items() if v})

    def test_batch_norm_act_alone(self, monkeypatch):
        layers = package("timm").layers
        model = layers.ConvNormAct(3, 4, 3)
        check(monkeypatch, model, images(), {RELU: 1})
        model = layers.ConvNormAct(3, 4, 3, apply_act=False)
        check(monkeypatch, model, images(), {None: 1})
        model = layers.ConvNormAct(3, 4, 3, drop_layer=nn.Dropout2d)
        fused = check(monkeypatch, model, images(), {ALONE: 1}, evaluation={RELU: 1})
        assert "Dropout" in reasons(fused.train())[0]

    def test_regnet(self, monkeypatch):
        check(monkeypatch, timm_model("regnetx_002"), images(64), {RELU: 27, ADD: 9, DUAL: 8}, modes=(True, False))
        check(monkeypatch, timm_model("regnety_002"), images(64), {RELU: 27, ADD: 9, DUAL: 8}, modes=(True, False))

    def test_res2net(self, monkeypatch):
        models = package("timm").models
        options = {"cardinality": 1, "base_width": 26, "block_args": {"scale": 4}}
        model = models.resnet.ResNet(models.res2net.Bottle2neck, (2, 1, 1, 1), num_classes=3, **options)
        model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(512, 3)
        check(monkeypatch, model, images(64), {RELU: 13, ADD: 1, DUAL: 4}, modes=(True, True, False))

    def test_dla(self, monkeypatch):
        model = timm_model("dla34", levels=(1, 1, 1, 2, 1, 1), channels=(4, 8, 8, 16, 16, 16))
        check(monkeypatch, model, images(64), {RELU: 18, ADD: 10, None: 1})

    def test_hrnet(self, monkeypatch):
        model = timm_model("hrnet_w18_small")
        check(monkeypatch, model, images(64), {RELU: 43, ADD: 18, DUAL: 10, None: 20}, modes=(True, False))

    def test_features_only(self, monkeypatch):
        model = package("timm").create_model("resnet10t", features_only=True)
        operators = {RELU: 7, ADD: 1, DUAL: 6}
        fused = check(monkeypatch, model, images(64), operators, modes=(True, False))
        assert len(fused(images(64))) == 5
        model = package("timm").create_model("resnetv2_18", features_only=True)
        check(monkeypatch, model, images(64), {RELU: 16}, modes=(True, False))

    @pytest.mark.parametrize("name", ["resnet10t", "resnetv2_18"])
    def test_frozen(self, monkeypatch, name):
        layers = package("timm").layers
        model = timm_model(name)
        layers.freeze_batch_norm_2d(model)
        assert any("Frozen" in type(module).__name__ for module in model.modules())
        operators = {"resnet10t": {RELU: 7, ADD: 1, DUAL: 6}, "resnetv2_18": {RELU: 17}}[name]
        check(monkeypatch, model, images(64), operators, modes=(True, False))

    def test_group_norm_is_reported(self):
        report = fusion_report(fuse(timm_model("resnet50_gn")))
        assert (report.fused, report.total) == (0, 0)
        assert "53 GroupNorm" in report.summary

    def test_other_activations_are_reported(self, monkeypatch):
        """TResNet, which had InplaceABN: LeakyReLU inside BatchNormAct2d; its blocks end in a ReLU."""
        timm = package("timm")
        model = timm.models.tresnet.TResNet([1, 1, 1, 1], num_classes=3, width_factor=0.25)
        fused = check(monkeypatch, model, images(64), {ADD: 1, DUAL: 4, None: 9})
        assert sum("LeakyReLU" in (reason or "") for reason in reasons(fused)) >= 4

    @pytest.mark.parametrize("name", ["skresnet18", "resnest14d", "repvgg_a0", "xception41", "ese_vovnet19b_dw"])
    def test_others(self, monkeypatch, name):
        operators = {
            "skresnet18": {RELU: 25, ADD: 5, DUAL: 6},
            "resnest14d": {RELU: 15, DUAL: 8},
            "repvgg_a0": {DUAL: 10, None: 51},
            "xception41": {RELU: 32, ALONE: 24, None: 28},
            "ese_vovnet19b_dw": {RELU: 23},
        }[name]
        check(monkeypatch, timm_model(name), images(64, batch=4), operators, modes=(True, False))


SIZES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1]}


class TestTransformers:
    @pytest.fixture
    def transformers(self):
        return package("transformers")

    @pytest.mark.parametrize("kind", ["basic", "bottleneck"])
    def test_resnet(self, transformers, monkeypatch, kind):
        operators = {"basic": {RELU: 4, ADD: 2, DUAL: 2}, "bottleneck": {RELU: 7, ADD: 2, DUAL: 2}}[kind]
        config = transformers.ResNetConfig(layer_type=kind, num_labels=3, **SIZES)
        check(monkeypatch, transformers.ResNetModel(config), {"pixel_values": images()}, operators)
        model = transformers.ResNetForImageClassification(config)
        inputs = {"pixel_values": images(), "labels": torch.tensor([0, 2])}
        check(monkeypatch, model, inputs, operators)

    def test_resnet_with_hidden_states(self, transformers, monkeypatch):
        config = transformers.ResNetConfig(layer_type="basic", output_hidden_states=True, **SIZES)
        model = transformers.ResNetModel(config)
        fused = check(monkeypatch, model, {"pixel_values": images()}, {RELU: 4, ADD: 2, DUAL: 2})
        assert len(fused(images()).hidden_states) == 3

    def test_other_activation(self, transformers, monkeypatch):
        """The first of the two activations of a block is a ReLU, whatever the configuration says."""
        config = transformers.ResNetConfig(layer_type="basic", hidden_act="gelu", **SIZES)
        fused = check(monkeypatch, transformers.ResNetModel(config), {"pixel_values": images()}, {RELU: 3, None: 5})
        assert sum("GELU" in (reason or "") for reason in reasons(fused)) == 5

    @pytest.mark.parametrize("kind", ["x", "y"])
    def test_regnet(self, transformers, monkeypatch, kind):
        config = transformers.RegNetConfig(layer_type=kind, groups_width=4, **SIZES)
        operators = {RELU: 7, ADD: 1, DUAL: 4}
        check(monkeypatch, transformers.RegNetModel(config), {"pixel_values": images()}, operators)

    @pytest.mark.parametrize("kind", ["basic", "bottleneck"])
    def test_rt_detr_backbone(self, transformers, monkeypatch, kind):
        # A basic block changes channels only together with the resolution.
        sizes = SIZES | {"embedding_size": 16 if kind == "basic" else 8, "hidden_sizes": [16, 32]}
        config = transformers.RTDetrResNetConfig(layer_type=kind, **sizes)
        operators = {"basic": {RELU: 6, ADD: 1, DUAL: 4}, "bottleneck": {RELU: 9, ADD: 1, DUAL: 4}}[kind]
        check(monkeypatch, transformers.RTDetrResNetBackbone(config), {"pixel_values": images(64)}, operators)

    @pytest.mark.parametrize("with_timm", [False, True], ids=["own backbone", "backbone of timm"])
    def test_detr_with_frozen_batch_norm(self, transformers, monkeypatch, with_timm):
        small = {"d_model": 16, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1}
        small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        small |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        if with_timm:
            package("timm")
            backbone = {"use_timm_backbone": True, "backbone": "resnet10t", "backbone_config": None}
        else:
            config = transformers.ResNetConfig(out_features=["stage2"], **SIZES)
            backbone = {"use_timm_backbone": False, "backbone": None, "backbone_config": config}
        config = transformers.DetrConfig(use_pretrained_backbone=False, **backbone, **small)
        model = transformers.DetrModel(config)
        frozen = [module for module in model.modules() if "FrozenBatchNorm2d" in type(module).__name__]
        operators = {RELU: 7, ADD: 1, DUAL: 6} if with_timm else {RELU: 7, ADD: 2, DUAL: 2}
        assert len(frozen) == sum(operators.values())
        check(monkeypatch, model, {"pixel_values": images(64)}, operators)


UNET = {"encoder_weights": None, "decoder_channels": (32, 32, 16, 16, 16)}


class TestSegmentationModels:
    @pytest.fixture
    def smp(self):
        return package("segmentation_models_pytorch")

    def test_unet(self, smp, monkeypatch):
        model = smp.Unet("resnet18", **UNET)
        check(monkeypatch, model, images(64), {RELU: 19, ADD: 5, DUAL: 6}, modes=(True, False))

    def test_unet_with_attention(self, smp, monkeypatch):
        model = smp.Unet("resnet18", **UNET, decoder_attention_type="scse")
        check(monkeypatch, model, images(64), {RELU: 19, ADD: 5, DUAL: 6}, modes=(True, False))

    def test_unet_with_an_encoder_of_timm(self, smp, monkeypatch):
        package("timm")
        model = smp.Unet("tu-resnet10t", **UNET)
        check(monkeypatch, model, images(64), {RELU: 17, ADD: 1, DUAL: 6}, modes=(True, False))

    def test_fpn(self, smp, monkeypatch):
        model = smp.FPN("resnet18", encoder_weights=None, decoder_pyramid_channels=32, decoder_segmentation_channels=32)
        fused = check(monkeypatch, model, images(64), {RELU: 9, ADD: 5, DUAL: 6}, modes=(True, False))
        assert "7 GroupNorm" in fusion_report(fused).summary

    def test_deeplab_whose_strides_are_changed_afterwards(self, smp, monkeypatch):
        model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_channels=16)
        check(monkeypatch, model, images(64), {RELU: 18, ADD: 5, DUAL: 6}, modes=(True, False))

    def test_pspnet(self, smp, monkeypatch):
        model = smp.PSPNet("resnet18", encoder_weights=None, psp_out_channels=16)
        # The encoder has layers that a PSPNet of depth 3 does not call.
        check(monkeypatch, model, images(64, batch=4), {RELU: 13, ADD: 5, DUAL: 6}, modes=(True, False))


class TestMonai:
    @pytest.fixture
    def nets(self):
        return package("monai").networks.nets

    def test_resnet_in_two_dimensions(self, nets, monkeypatch):
        options = {"spatial_dims": 2, "n_input_channels": 3, "num_classes": 3}
        model = nets.ResNet("basic", [1, 1, 1, 1], [8, 8, 16, 16], **options)
        check(monkeypatch, model, images(64), {RELU: 5, ADD: 1, DUAL: 6})

    def test_resnet_in_three_dimensions(self, nets, monkeypatch):
        options = {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 3}
        model = nets.ResNet("bottleneck", [1, 1, 1, 1], [4, 4, 8, 8], **options)
        x = torch.randn(2, 1, 24, 24, 24, dtype=torch.float64)
        check(monkeypatch, model, x, {RELU: 9, DUAL: 8})

    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_unet(self, nets, monkeypatch, dimensions):
        sizes = {"in_channels": 3, "out_channels": 2, "channels": (4, 8, 8), "strides": (2, 2)}
        x = torch.randn(2, 3, *[16] * dimensions, dtype=torch.float64)
        model = nets.UNet(spatial_dims=dimensions, **sizes, num_res_units=2, norm="BATCH", act="RELU")
        # Dropout of rate 0 comes between them.
        check(monkeypatch, model, x, {RELU: 9})
        model = nets.UNet(spatial_dims=dimensions, **sizes, norm="BATCH", act="RELU", dropout=0.2)
        check(monkeypatch, model, x, {ALONE: 4}, evaluation={RELU: 4})

    def test_se_resnet(self, nets, monkeypatch):
        block = package("monai").networks.blocks.SEResNetBottleneck
        options = {"groups": 1, "reduction": 4, "dropout_prob": None, "num_classes": 3}
        model = nets.SENet(2, 3, block, [1, 1, 1, 1], **options, inplanes=8)
        fused = check(monkeypatch, model, images(64), {RELU: 11, None: 8}, modes=(True, False))
        assert sum("ChannelSELayer" in (reason or "") for reason in reasons(fused)) == 4

    def test_group_norm_is_reported(self, nets):
        options = {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)}
        report = fusion_report(fuse(nets.SegResNet(2, in_channels=3, out_channels=2, **options)))
        assert (report.fused, report.total) == (0, 0)
        assert "7 GroupNorm" in report.summary


class Residual3d(nn.Module):
    """The block of He et al. in three dimensions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.conv2, self.bn2 = nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4)

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + x)


class Signs(nn.Module):
    """Has every unary operator of Python beside its BatchNorms."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.more = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x):
        x = x.masked_fill(~(x > 2), +0.5)
        x = -torch.relu(self.bn(x))
        return torch.relu(self.more[-1](x)) + torch.relu(self.more[-2](x))


class InPlaceABN(nn.BatchNorm2d):
    """As in the package inplace_abn: normalization and activation in one module, with a forward of its own."""

    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x), 0.01)


class TestTorch:
    @pytest.mark.parametrize("length", [None, 9], ids=["NC", "NCL"])
    def test_one_dimension(self, monkeypatch, length):
        layer = nn.Linear(5, 6) if length is None else nn.Conv1d(5, 6, 3)
        last = nn.Linear(6, 4) if length is None else nn.Conv1d(6, 4, 3)
        model = nn.Sequential(layer, nn.BatchNorm1d(6), nn.ReLU(), last, nn.BatchNorm1d(4), nn.ReLU(inplace=True))
        x = torch.randn(8, 5, *([] if length is None else [length]), dtype=torch.float64)
        check(monkeypatch, model, x, {RELU: 2})

    def test_three_dimensions(self, monkeypatch):
        x = torch.randn(2, 4, 4, 6, 5, dtype=torch.float64)
        check(monkeypatch, nn.Sequential(Residual3d(), Residual3d()), x, {RELU: 2, ADD: 2})

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
    def test_memory_format_in_three_dimensions(self, monkeypatch, memory_format):
        """Strides are among what check() compares; convolutions in float64 would give their own."""
        x = torch.randn(2, 4, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
        fused = check(monkeypatch, nn.Sequential(nn.BatchNorm3d(4), nn.ReLU()), x, {RELU: 1})
        assert fused(x).is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_two_dimensions(self, monkeypatch, memory_format):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        x = images().contiguous(memory_format=memory_format)
        fused = check(monkeypatch, model.to(memory_format=memory_format), x, {RELU: 1, ALONE: 1})
        assert fused(x).is_contiguous(memory_format=memory_format)

    def test_transposed_convolutions(self, monkeypatch):
        model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())
        check(monkeypatch, model, images(8), {RELU: 1})

    def test_unary_operators(self, monkeypatch):
        check(monkeypatch, Signs(), images(8), {RELU: 3})

    def test_in_place_abn_is_reported(self, monkeypatch):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), InPlaceABN(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        fused = check(monkeypatch, model, images(), {RELU: 1, None: 1})
        rows = fusion_report(fused).rows
        assert [(row.module, row.fused) for row in rows] == [("InPlaceABN", False), ("BatchNorm2d", True)]
        assert type(unfuse(fused)[1]) is InPlaceABN
