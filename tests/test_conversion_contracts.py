"""A fused model is the same model: hooks, copies, compilers, checkpointing, frozen and replaced modules."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import bypass, fuse, fusion_report, unfuse

torchvision = pytest.importorskip("torchvision")
resnet = torchvision.models.resnet

# float64 on both sides, as in test_modules.py, through at most nine normalizations.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


pytestmark = pytest.mark.usefixtures("one_thread")


def small(block=resnet.BasicBlock, **options):
    """A ResNet of two layers with two blocks each; the first of layer2 (of both for Bottleneck) has a projection."""
    model = resnet.ResNet(block, [2, 2, 1, 1], num_classes=4, **options)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 4)
    return model.double()


def images():
    return torch.randn(4, 3, 24, 24, dtype=torch.float64)


def train_step(model, x):
    loss = F.cross_entropy(model(x), torch.arange(4))
    loss.backward()
    return loss.detach()


def assert_same_step(model, reference, x=None):
    x = images() if x is None else x
    model.zero_grad()
    reference.zero_grad()
    torch.testing.assert_close(train_step(model, x), train_step(reference, x), **TOLERANCE)
    assert_same_state(model, reference)


def assert_same_state(model, reference):
    for (name, mine), its in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    for (name, mine), its in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, its, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def pair(*arguments, **options):
    reference = small(*arguments, **options)
    return fuse(copy.deepcopy(reference)), reference


def layer2_reason(model):
    return {row.name: row.reason for row in fusion_report(model).rows if row.name.startswith("layer2.0.")}


# Hooks

HOOKED = ["bn1", "layer2.0", "layer2.0.conv1", "layer2.0.bn1", "layer2.0.bn2", "layer2.0.relu"]
HOOKED += ["layer2.0.downsample", "layer2.0.downsample.0", "layer2.0.downsample.1"]


@pytest.mark.parametrize("name", HOOKED)
def test_forward_hooks_fire_with_the_same_values(name):
    seen = []
    for model in pair():
        values = []
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, i, v=values: v.append(i[0].detach().clone()))
        module.register_forward_hook(lambda m, i, o, v=values: v.append(o.detach().clone()))
        torch.manual_seed(0)
        model(images())
        seen.append(values)
    assert len(seen[0]) == (4 if name.endswith("relu") else 2)
    torch.testing.assert_close(*seen, **TOLERANCE)


@pytest.mark.parametrize("name", ["layer2.0.conv2", "layer2.0.bn2", "layer2.0.relu", "layer2.0.downsample"])
def test_backward_hooks_fire_with_the_same_values(name):
    seen = []
    for model in pair():
        values = []
        for block in (model, *model.layer1, *model.layer2):
            # torch refuses a backward hook on what is then changed in place.
            block.relu.inplace = False
        module = model.get_submodule(name)
        if name.endswith("bn2"):
            module.register_forward_hook(lambda m, i, o: o.clone())
        module.register_full_backward_pre_hook(lambda m, g, v=values: v.append(g[0].clone()))
        if not name.endswith("conv2"):
            module.register_full_backward_hook(lambda m, i, o, v=values: v.extend((i[0].clone(), o[0].clone())))
        torch.manual_seed(0)
        try:
            train_step(model, images())
        except RuntimeError as error:
            # torchvision adds in place, which a hook on the summand forbids: fused and unfused alike.
            values = [str(error)]
        seen.append(values)
    assert seen[0]
    if isinstance(seen[0][0], str):
        assert seen[0] == seen[1]
    else:
        torch.testing.assert_close(*seen, **TOLERANCE)


def test_a_hook_can_change_the_output():
    model, reference = pair()
    for m in (model, reference):
        m.layer1[0].bn1.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_same_step(model, reference)


def test_a_hook_on_all_modules_fires():
    model, reference = pair()
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: called.append(type(m).__name__))
    try:
        model(images())
        mine = list(called)
        assert fusion_report(model).fused == 0
        called.clear()
        reference(images())
    finally:
        handle.remove()
    assert mine == called
    assert fusion_report(model).fused == 10


REGISTER = {
    "has a forward hook": lambda m: m.register_forward_hook(lambda *_: None),
    "has a forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "has a backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "has a backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("reason", REGISTER)
def test_the_report_names_hooks(reason):
    model, _ = pair()
    handle = REGISTER[reason](model.layer2[0].relu)
    assert set(layer2_reason(model).values()) == {
        f"its {what} goes to relu, which {reason}" for what in ("output", "sum")
    }
    handle.remove()
    assert set(layer2_reason(model).values()) == {None}
    handle = REGISTER[reason](model.layer2[0].downsample[1])
    # A hook there may look at bn2, which therefore runs first.
    early = "downsample runs before it is used, and may look at its BatchNorm"
    expected = {"bn1": None, "bn2": early, "downsample.1": f"downsample.1 {reason}"}
    assert layer2_reason(model) == {f"layer2.0.{name}": value for name, value in expected.items()}
    handle.remove()
    REGISTER[reason](model.layer2[0].downsample)
    assert layer2_reason(model)["layer2.0.downsample.1"] == f"downsample {reason}"
    assert layer2_reason(model)["layer2.0.bn2"] == early
    assert layer2_reason(model)["layer2.0.bn1"] is None


PATCHED = {"_BatchNorm": nn.modules.batchnorm._BatchNorm, "ReLU": nn.ReLU, "Sequential": nn.Sequential}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", PATCHED)
def test_a_forward_replaced_on_the_class_of_torch_is_called(name, compiled, monkeypatch):
    model, reference = pair()
    if compiled:
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same_step(model, reference)
    cls = PATCHED[name]
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, input: original(self, input) * 2)
    assert_same_step(model, reference)
    reasons = [row.reason for row in fusion_report(model).rows]
    known = {
        "_BatchNorm": "bn1 is of BatchNorm2d",
        "ReLU": "relu, which is of ReLU",
        "Sequential": "downsample is of Sequential",
    }
    assert any(f"{known[name]}, whose forward was replaced" in (reason or "") for reason in reasons)
    monkeypatch.undo()
    assert fusion_report(model).fused == 10


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("where", "name"), [("layer1.0", "forward"), ("", "forward"), ("", "_forward_impl")])
def test_methods_replaced_on_the_instance(where, name, late):
    model = small()
    if late:
        fuse(model)
    module = model.get_submodule(where)
    setattr(module, name, lambda x: x)
    fuse(model)
    assert module(images()).shape == (4, 3, 24, 24)
    rows = {row.name: row for row in fusion_report(model).rows}
    concerned = ["layer1.0.bn1", "layer1.0.bn2"] if where else ["bn1"]
    assert {row.name for row in rows.values() if not row.fused} == set(concerned)
    assert all(f"its {name} was replaced on the instance" in rows[bn].reason for bn in concerned)


# Modules that change after fuse()


def replaced_norm(model):
    model.layer2[0].bn1 = nn.GroupNorm(4, 128).double()


def replaced_activation(model):
    model.layer2[0].relu = nn.LeakyReLU(0.1, inplace=True)


def shared_norm(model):
    model.layer2[0].bn2 = model.layer2[0].bn1


def shared_with_shortcut(model):
    model.layer2[0].downsample[1] = model.layer2[0].bn2


def identity_norm(model):
    model.layer2[1].bn2 = nn.Identity()


def longer_shortcut(model):
    model.layer2[0].downsample.insert(0, nn.Identity())


def other_shortcut(model):
    model.layer2[0].downsample = nn.Sequential(model.layer2[0].downsample[0], nn.Identity())


def replaced_forward(model):
    model.layer2[0].bn1.forward = lambda input: input * 2


def frozen_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def frozen_shortcut(model):
    model.layer2[0].downsample[1].eval()


def frozen_parameters(model):
    model.layer1.requires_grad_(False)
    model.bn1.requires_grad_(False)


def cumulative_average(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def zero_gamma(model):
    for block in (*model.layer1, *model.layer2):
        nn.init.zeros_(block.bn2.weight)


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model.layer1[0].bn1, "weight", nn.Softplus())


CHANGES = [replaced_norm, replaced_activation, shared_norm, shared_with_shortcut, identity_norm, longer_shortcut]
CHANGES += [other_shortcut, replaced_forward, frozen_norms, frozen_shortcut, frozen_parameters, cumulative_average]
CHANGES += [zero_gamma, parametrized]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_modules_changed_after_fuse(change):
    model, reference = pair()
    for m in (model, reference):
        torch.manual_seed(0)
        change(m)
    for _ in range(2):
        assert_same_step(model, reference)
    model.eval()
    reference.eval()
    assert_same_step(model, reference)


def test_converted_to_sync_batch_norm():
    """Where no other process takes part it is a BatchNorm, and fused as one."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(small()))
    assert fusion_report(model).fused == 10
    reference = nn.SyncBatchNorm.convert_sync_batchnorm(unfuse(copy.deepcopy(model)))
    for _ in range(2):
        assert_same_step(model, reference)
    assert_same_step(model.eval(), reference.eval())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert fusion_report(model).fused == 10  # evaluation
        report = fusion_report(model.train())
        assert report.fused == 0
        assert report.rows[0].reason == "bn1 synchronizes its statistics with other processes in training"
        with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
            model(images())
    finally:
        distributed.destroy_process_group()


# Copies and graphs


def test_an_optimizer_made_before_goes_on():
    reference = small()
    model = copy.deepcopy(reference)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, reference)]
    x = images()
    for step in range(3):
        if step == 1:
            fuse(model)
        if step == 2:
            unfuse(model)
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            train_step(m, x)
            optimizer.step()
    assert_same_state(model, reference)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), **TOLERANCE)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "pickle 0", "torch.save"])
def test_copies_are_fused_and_independent(how):
    model, reference = pair(resnet.Bottleneck)
    model.fc.register_forward_hook(importable_hook)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = pickle.loads(pickle.dumps(model, protocol=0 if how.endswith("0") else None))
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert fusion_report(other).rows == fusion_report(model).rows
    assert len(other.fc._forward_hooks) == 1
    assert all(a is not b for a, b in zip(other.parameters(), model.parameters(), strict=True))
    before = copy.deepcopy(model.state_dict())
    assert_same_step(other, reference)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(unfuse(other)) is resnet.ResNet
    assert type(model) is not resnet.ResNet


def importable_hook(module, inputs, output):
    """A hook that pickle finds by name."""


def test_two_forwards_before_a_backward():
    model, reference = pair()
    x, x2 = images(), images()
    for m in (model, reference):
        (m(x).square().sum() + m(x2).sum()).backward()
    assert_same_state(model, reference)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_checkpointing_counts_a_batch_once(use_reentrant, momentum, backend):
    """Unfused torch counts twice here; the gradients are those of a run without checkpointing."""
    model, reference = pair()
    for m in (model, reference):
        for module in m.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    with resnet_fused.backend(backend):
        x = images()
        hidden = model.maxpool(F.relu(model.bn1(model.conv1(x))))
        for layer in (model.layer1, model.layer2):
            hidden = checkpoint(layer, hidden, use_reentrant=use_reentrant)
        F.cross_entropy(model.fc(model.avgpool(hidden).flatten(1)), torch.arange(4)).backward()
    train_step(reference, x)
    assert model.layer2[1].bn2.num_batches_tracked == 1
    assert_same_state(model, reference)


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_compile_as_one_graph(block):
    model, reference = pair(block)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same_step(compiled, reference)
    assert model.bn1.num_batches_tracked == 2


def test_compiled_code_heeds_what_was_there_before():
    model, reference = pair()
    for m in (model, reference):
        m.layer2[0].bn1.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_same_step(torch.compile(model, fullgraph=True, backend="aot_eager"), reference)


def test_export():
    model, reference = pair()
    x = images()
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), reference.eval()(x), **TOLERANCE)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("resnet_fused" in target for target in targets) == 9  # the stem, and two in each block
    assert not any("aten.batch_norm" in target or "native_batch_norm" in target for target in targets)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_symbolic_traces_see_the_unfused_model():
    from torchvision.models.feature_extraction import create_feature_extractor

    model, reference = pair()
    graphs = [torch.fx.symbolic_trace(m).graph for m in (model, reference)]
    assert [n.format_node() for n in graphs[0].nodes] == [n.format_node() for n in graphs[1].nodes]
    x = images()
    model.eval()
    expected = create_feature_extractor(reference.eval(), ["layer2"])(x)["layer2"]
    torch.testing.assert_close(create_feature_extractor(model, ["layer2"])(x)["layer2"], expected, **TOLERANCE)
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), reference(x), **TOLERANCE)
    assert not any(node.kind().startswith(("resnet_fused::", "^")) for node in traced.inlined_graph.nodes())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_the_dtype_that_eager_has(dtype):
    model, reference = (m.float() for m in pair())
    dtypes = []
    x = torch.randn(4, 3, 48, 48)
    for m in (model, reference):
        m.layer2[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        with torch.autocast("cpu", dtype=dtype):
            train_step(m, x)
    assert dtypes == [dtype, dtype]
    assert model.bn1.running_mean.dtype == torch.float32


def test_residuals_of_another_shape_or_dtype_are_left_to_torch():
    """torchvision adds in place: the sum has the dtype of the main branch, and the shortcut is broadcast."""
    for shape, dtype in (((2, 1, 6, 6), torch.float64), ((2, 4, 6, 6), torch.float32)):
        reference = resnet.BasicBlock(shape[1], 4).double()
        reference.conv1.register_forward_pre_hook(lambda m, inputs: (inputs[0].double(),))
        block = fuse(copy.deepcopy(reference))
        x = torch.randn(shape, dtype=dtype)
        output, expected = block(x), reference(x)
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected, **TOLERANCE)


def test_frozen_batch_norm_of_torchvision():
    model, reference = pair(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    for m in (model, reference):
        torch.manual_seed(0)
        for norm in m.modules():
            if isinstance(norm, torchvision.ops.FrozenBatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                norm.weight.normal_()
                norm.bias.normal_()
    assert_same_step(model, reference)
    assert fusion_report(model).fused == 10
    # Buffers of another dtype than the input: it computes in the wider of the two.
    blocks = [m.layer1[0].float() for m in (model, reference)]
    for block in blocks:
        block.bn2.double()
        block.conv1.register_forward_hook(lambda module, inputs, output: output.float())
    x = torch.randn(2, 64, 6, 6)
    outputs = [block(x) for block in blocks]
    assert outputs[0].dtype == outputs[1].dtype == torch.float64
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)  # convolutions in float32
    model.bn1.register_buffer("weight", model.bn1.weight.float())
    assert "buffers differ in dtype" in fusion_report(model).rows[0].reason


def test_distributed_data_parallel_can_be_fused_at_any_time():
    model, reference = pair()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(unfuse(model))
        assert_same_step(wrapped, reference)
        assert fuse(wrapped) is wrapped
        assert fusion_report(wrapped).fused == 10
        assert_same_step(wrapped, reference)
    finally:
        distributed.destroy_process_group()


def test_code_compiled_before_fuse_is_compiled_again():
    from torch._dynamo.testing import CompileCounterWithBackend

    def fused_operators():
        return sum("resnet_fused" in str(node.target) for node in counter.graphs[-1].graph.nodes)

    model, reference = small(), small()
    model.load_state_dict(reference.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_same_step(compiled, reference)
    assert fused_operators() == 0
    fuse(model)
    assert_same_step(compiled, reference)
    assert fused_operators() > 0
    unfuse(model)
    assert_same_step(compiled, reference)


def test_the_checks_find_what_hangs_on_a_module():
    bn = nn.BatchNorm2d(4)
    assert bypass.why_not(bn, nn.BatchNorm2d) is None
    for reason, register in REGISTER.items():
        handle = register(bn)
        assert bypass.why_not(bn, nn.BatchNorm2d) == reason
        handle.remove()
    assert bypass.why_not(bn, nn.ReLU) == "a BatchNorm2d, not a ReLU"
    assert bypass.why_watched(torch.ones(())) is None
    assert bypass.why_watched(None) is not None
