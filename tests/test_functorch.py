"""Transforms around the operators: functorch, forward-mode AD, autocast, torch.compile and torch.export."""

import dataclasses

import oracle
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from oracle import OPS
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from resnet_fused import functional

SHAPE = (4, 3, 5, 2)


def _tensors(device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return normal(*SHAPE), normal(3) + 1, normal(3), normal(*SHAPE)


def _functional(input, weight, bias, residual):
    return functional.batch_norm_add_relu(input, None, None, weight, bias, residual, True)


def _operator(input, weight, bias, residual):
    return OPS.batch_norm_add_relu_train(input, weight, bias, residual, 1e-5, True, True)[0]


def _unfused(input, weight, bias, residual):
    return F.relu(F.batch_norm(input, None, None, weight, bias, True) + residual)


def _scalar(function):
    return lambda *arguments: function(*arguments).sin().sum()


TRANSFORMS = {
    "grad": lambda f, x: grad(_scalar(f), argnums=(0, 1, 2, 3))(*x),
    "grad of grad": lambda f, x: grad(lambda *a: grad(_scalar(f))(*a).square().sum())(*x),
    "vjp": lambda f, x: vjp(f, *x)[1](x[3]),
    "jvp": lambda f, x: jvp(f, x, tuple(reversed_(x)))[1],
    "jacrev": lambda f, x: jacrev(f, argnums=(0, 1))(*x),
    "jacfwd": lambda f, x: jacfwd(f, argnums=1)(*x),
    "vmap": lambda f, x: vmap(f, (0, None, None, 0))(torch.stack([x[0], x[3]]), *x[1:3], torch.stack([x[3], x[3]])),
    "vmap of grad": lambda f, x: vmap(grad(_scalar(f)), (0, None, None, None))(torch.stack([x[0], x[3]]), *x[1:]),
    "hessian": lambda f, x: jacfwd(jacrev(lambda weight: _scalar(f)(x[0], weight, *x[2:])))(x[1]),
}


def reversed_(x):
    """Tangents of the right shapes that are not the points themselves."""
    return x[3], x[2], x[1], x[0]


@pytest.mark.parametrize("function", [_functional, _operator], ids=["functional", "operator"])
@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms(name, function, device):
    x = _tensors(device)
    # Float64: sums of forty products of numbers of the order of one to ten.
    torch.testing.assert_close(TRANSFORMS[name](function, x), TRANSFORMS[name](_unfused, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "jacrev"])
def test_transforms_of_add_relu(name, device):
    x = _tensors(device)

    def ours(input, weight, bias, residual):
        return functional.add_relu(input, residual) * weight.sum() * bias.sum()

    def theirs(input, weight, bias, residual):
        return (input + residual).relu() * weight.sum() * bias.sum()

    assert_close = torch.testing.assert_close
    assert_close(TRANSFORMS[name](ours, x), TRANSFORMS[name](theirs, x), rtol=1e-12, atol=1e-12)


def test_vmap_over_running_statistics_is_refused_as_torch_does(device):
    input, mean, var = (
        torch.randn(2, *SHAPE, device=device),
        torch.zeros(3, device=device),
        torch.ones(3, device=device),
    )
    for function in (functional.batch_norm_add_relu, F.batch_norm):
        with pytest.raises(RuntimeError, match="running_mean"):
            vmap(lambda x, f=function: f(x, mean, var, training=True))(input)
        assert not mean.any()


@pytest.mark.parametrize("function", [_functional, _operator], ids=["functional", "operator"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode(requires_grad, function, device):
    """A tangent is carried on, whether reverse mode runs beside or not."""
    x = [t.requires_grad_(requires_grad) for t in _tensors(device)]
    tangents = reversed_([t.detach() for t in x])
    results = []
    for f in (function, _unfused):
        with forward_ad.dual_level():
            output = f(*(forward_ad.make_dual(t, tangent) for t, tangent in zip(x, tangents, strict=True)))
            results.append(forward_ad.unpack_dual(output))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_forward_mode_level_without_tangents(device):
    x = _tensors(device)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(_functional(*x)).tangent is None
        torch.testing.assert_close(_operator(*x), _unfused(*x), rtol=1e-12, atol=1e-12)


class _Block(nn.Module):
    """A normalization with residual, by the functional form or by torch's operations."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.bn = nn.BatchNorm2d(3)

    def forward(self, input, residual):
        bn = self.bn
        if not self.fused:
            return F.relu(bn(input) + residual)
        return functional.batch_norm_add_relu(
            input, bn.running_mean, bn.running_var, bn.weight, bn.bias, residual, bn.training, 0.1, bn.eps
        )


def test_functional_call(device):
    input, weight, bias, residual = _tensors(device)
    gradients = []
    for fused in (True, False):
        block = _Block(fused).to(device).double().eval()
        parameters = {"bn.weight": weight, "bn.bias": bias}

        def loss(parameters, block=block):
            return functional_call(block, parameters, (input, residual)).sin().sum()

        gradients.append(grad(loss)(parameters))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


# Autocast.


@pytest.mark.parametrize("autocast_dtype", oracle.HALVES, ids=oracle.dtype_name)
@pytest.mark.parametrize(
    "dtypes", [(a, b) for a in (0, 1) for b in (0, 1)], ids=["half half", "half float", "float half", "float float"]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training, dtypes, autocast_dtype, device):
    """Dtype and values of the operations apart: no list of autocast has batch_norm, and add promotes."""
    dtypes = [(autocast_dtype, torch.float32)[i] for i in dtypes]
    case = oracle.make_case(SHAPE, dtypes[0], device, "bn_add_relu", training)
    case = dataclasses.replace(case, residual=case.residual.to(dtypes[1]))
    b = case.branches[0]
    with torch.autocast(device.type, autocast_dtype):
        ours, theirs = oracle.functional_output(_fresh(case)), oracle.unfused_result(_fresh(case))
    reference = oracle.unfused_result(oracle.like(case, lambda tensor: tensor.double()))
    oracle.assert_as_accurate(
        ours, theirs, reference.detach().cpu().numpy(), "output", oracle.scales(case)["output"], dtype=b.input.dtype
    )


def _fresh(case):
    branches = [
        dataclasses.replace(b, running_mean=b.running_mean.clone(), running_var=b.running_var.clone())
        for b in case.branches
    ]
    return dataclasses.replace(case, branches=branches)


def test_autocast_of_the_operators(device):
    """Called directly they promote too."""
    input, weight, bias, residual = _tensors(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        assert _operator(input.bfloat16(), weight, bias, residual).dtype == torch.float32
        assert OPS.add_relu(input.bfloat16(), residual, True)[0].dtype == torch.float32
        assert OPS.add_relu(input.bfloat16(), residual.bfloat16(), True)[0].dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="residual"):
        _operator(input.bfloat16(), weight, bias, residual)


def test_training_step_under_autocast(device):
    """Convolution in bfloat16, the normalization after it on its output, gradients in the parameters' dtype."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        convolution, block = nn.Conv2d(3, 3, 3, padding=1).to(device), _Block(fused).to(device)
        input = torch.randn(2, 3, 8, 8, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = convolution(input)
            output = block(hidden, hidden)
        output.float().square().sum().backward()
        results.append([output.detach(), block.bn.weight.grad, block.bn.bias.grad, convolution.weight.grad])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        # A few roundings to bfloat16's eight bits along the way, of the largest value.
        bound = 4 * torch.finfo(torch.bfloat16).eps * float(theirs.abs().max())
        assert float((ours.double() - theirs.double()).abs().max()) <= bound


# Torch.compile and torch.export.


def _step(function, case):
    """Output, running statistics and gradients of one call, through ``function``."""
    case = oracle.owned(case)
    return oracle.collect(case, function(case))


@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_graph_gives_the_bits_of_eager(layout, training, form, device):
    """Forward and backward as AOTAutograd traces them, in one graph."""
    torch.compiler.reset()
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device, form, training, layout)
    compiled = torch.compile(oracle.functional_output, fullgraph=True, backend="aot_eager", dynamic=False)
    expected = _step(oracle.functional_output, case)
    for name, value in _step(compiled, case).items():
        assert torch.equal(value, expected[name]), name
        if name in ("output", "grad_input"):
            assert value.stride() == expected[name].stride(), name


@pytest.mark.skipif("config.getoption('--backend') == 'ptx'", reason="Triton's graphs have the launches instead")
def test_compiled_graph_has_the_fused_operators(device):
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    torch.compiler.reset()
    graphs = AotEagerAndRecordGraphs()
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device)
    _step(torch.compile(oracle.functional_output, fullgraph=True, backend=graphs), case)
    for recorded, name in (
        (graphs.fw_graphs, "batch_norm_add_relu_train"),
        (graphs.bw_graphs, "batch_norm_add_relu_train_backward"),
    ):
        (graph,) = recorded
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert f"resnet_fused.{name}.default" in targets
        assert not [target for target in targets if "native_batch_norm" in target]


def test_inductor(device, backend_name):
    if backend_name == "ptx":
        pytest.skip("Inductor has no Triton for CPU tensors")
    torch.compiler.reset()
    case = oracle.make_case((2, 9, 5, 3), torch.float32, device)

    def around(case):
        return oracle.functional_output(case) * 2

    expected = _step(around, case)
    for name, value in _step(torch.compile(around, fullgraph=True), case).items():
        assert torch.equal(value, expected[name]), name


def test_dynamic_shapes(device):
    torch.compiler.reset()
    compiled = torch.compile(_functional, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 4, 4), (5, 3, 7, 3), (3, 3, 9, 1), (2, 3, 4, 4)):
        input, residual = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
        weight, bias = (torch.randn(3, device=device, requires_grad=True) for _ in range(2))
        leaves = (input, weight, bias, residual)
        outputs = [f(*leaves) for f in (compiled, _functional)]
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(output.square().sum(), leaves) for output in outputs]
        for ours, expected in zip(*gradients, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_running_statistics(training, device):
    torch.compiler.reset()
    blocks = [_Block(True).to(device).train(training) for _ in range(2)]
    compiled = torch.compile(blocks[0], fullgraph=True, backend="aot_eager")
    for _ in range(3):
        input, residual = (torch.randn(4, 3, 5, 5, device=device) for _ in range(2))
        assert torch.equal(compiled(input, residual), blocks[1](input, residual))
    for ours, expected in zip(blocks[0].buffers(), blocks[1].buffers(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(training, device):
    block = _Block(True).to(device).train(training)
    arguments = tuple(torch.randn(4, 3, 5, 5, device=device) for _ in range(2))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(block, arguments, dynamic_shapes=({0: batch}, {0: batch}))
    name = f"resnet_fused.batch_norm_add_relu_{'train' if training else 'eval'}.default"
    assert name in [str(node.target) for node in program.graph.nodes]
    for size in (4, 7):
        arguments = tuple(torch.randn(size, 3, 5, 5, device=device) for _ in range(2))
        assert torch.equal(program.module()(*arguments), block(*arguments))


def test_tracing_by_make_fx(device):
    from torch.fx.experimental.proxy_tensor import make_fx

    x = _tensors(device, torch.float32)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(_functional, tracing_mode=mode)(*x)
        assert torch.equal(graph(*x), _functional(*x))


@pytest.mark.parametrize("dual", [False, True], ids=["one branch", "two branches"])
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((1, 3, 1, 1), (torch.float32, torch.float32)),
        ((2, 3, 4, 4), (torch.float64, torch.float32)),
        ((2, 3, 4, 4), (torch.float32, torch.float64)),
        ((2, 3, 4, 4), (torch.float32, torch.bfloat16)),
    ],
    ids=["one value a channel", "float64 input", "float64 statistics", "bfloat16 statistics"],
)
def test_compiled_training_refuses_what_eager_refuses(shape, dtypes, dual, device):
    x = torch.randn(shape, device=device, dtype=dtypes[0])
    running = torch.zeros(3, device=device, dtype=dtypes[1]), torch.ones(3, device=device, dtype=dtypes[1])

    def call(x):
        if dual:
            good = torch.zeros(3, device=device, dtype=dtypes[0]), torch.ones(3, device=device, dtype=dtypes[0])
            return functional.dual_batch_norm_add_relu(x, *good, None, None, x, *running, training=True)
        return functional.batch_norm_add_relu(x, *running, training=True)

    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        with pytest.raises((RuntimeError, ValueError)):
            function(x)
        assert float(running[0].float().abs().sum()) == 0
        assert bool((running[1] == 1).all())
