"""torch.library.opcheck: schema, fake kernel, autograd registration and tracing of every operator."""

import oracle
import pytest
import torch
from oracle import OPS

from resnet_fused import ops

SHAPE = (2, 9, 3, 5)


def _case(form, training, layout, device, dtype=torch.float32):
    return oracle.make_case(SHAPE, dtype, device, form, training, layout)


def _forward_arguments(name, case, requires_grad=False):
    a = case.branches[0]

    def leaf(tensor):
        return (
            None
            if tensor is None
            else tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(requires_grad)
        )

    first = (leaf(a.input), leaf(a.weight), leaf(a.bias))
    running = (a.running_mean, a.running_var)
    if name == "batch_norm_add_relu_train":
        return (*first, leaf(case.residual), a.eps, case.relu, True)
    if name == "batch_norm_add_relu_eval":
        return (*first, leaf(case.residual), *running, a.eps, case.relu, True)
    if name == "batch_norm_add_relu_apply":
        return (*first, leaf(case.residual), *running, case.relu, True)
    if name == "batch_norm_statistics":
        return first[:1]
    if name == "add_relu":
        return (first[0], leaf(case.grad_output), True)
    b = case.branches[1]
    second = (leaf(b.input), leaf(b.weight), leaf(b.bias))
    if name == "dual_batch_norm_add_relu_train":
        return (*first, *second, a.eps, b.eps, case.relu, True)
    assert name == "dual_batch_norm_add_relu_eval"
    return (*first, *running, *second, b.running_mean, b.running_var, a.eps, b.eps, case.relu, True)


def _other_arguments(name, case):
    a = case.branches[0]
    running = (a.running_mean, a.running_var)
    results = oracle.operator_results(case)
    mask = results[-1] if results[-1].numel() else None
    everything = (True, False, True, False)
    if name == "add_relu_backward":
        output, mask = OPS.add_relu(a.input, case.grad_output, True)
        return (case.grad_output.contiguous(memory_format=ops.layout.suggest_memory_format(output)), mask)
    if name.endswith("with_update"):
        first, running = (a.input, a.weight, a.bias), (a.running_mean, a.running_var)
        if not name.startswith("dual"):
            return (*first, case.residual, *running, a.momentum, a.eps, case.relu, True)
        b = case.branches[1]
        second, running2 = (b.input, b.weight, b.bias), (b.running_mean, b.running_var)
        options = (a.momentum, b.momentum, a.eps, b.eps, case.relu, True)
        return (*first, *running, *second, *running2, *options)
    if name == "update_running_stats":
        return (*running, *results[1:3], 0.1, 30)
    common = (case.grad_output, a.input, a.weight, a.bias)
    if name == "batch_norm_add_relu_train_backward":
        return (*common, results[1], results[3], mask, case.relu, *everything)
    if name == "batch_norm_add_relu_eval_backward":
        return (*common, *running, mask, a.eps, case.relu, *everything)
    if name == "batch_norm_add_relu_backward_reduce":
        return (*common, results[1], results[3], mask, case.relu)
    if name == "batch_norm_add_relu_backward_apply":
        return (*common, results[1], results[3], mask, *running, case.relu, True, True)
    b = case.branches[1]
    start, needs = (case.grad_output, a.input, a.weight), (True, True, False, False, True, True)
    if name == "dual_batch_norm_add_relu_train_backward":
        return (*start, results[1], results[3], b.input, b.weight, results[4], results[6], mask, case.relu, *needs)
    assert name == "dual_batch_norm_add_relu_eval_backward"
    running2 = (b.running_mean, b.running_var)
    return (*start, *running, b.input, b.weight, *running2, mask, a.eps, b.eps, case.relu, *needs)


FORWARD = (
    "batch_norm_add_relu_train",
    "batch_norm_add_relu_eval",
    "batch_norm_add_relu_apply",
    "batch_norm_statistics",
    "add_relu",
    "dual_batch_norm_add_relu_train",
    "dual_batch_norm_add_relu_eval",
)
# What has no gradient or is one.
OTHERS = (
    "add_relu_backward",
    "update_running_stats",
    "batch_norm_add_relu_train_with_update",
    "dual_batch_norm_add_relu_train_with_update",
    "batch_norm_add_relu_train_backward",
    "batch_norm_add_relu_eval_backward",
    "batch_norm_add_relu_backward_reduce",
    "batch_norm_add_relu_backward_apply",
    "dual_batch_norm_add_relu_train_backward",
    "dual_batch_norm_add_relu_eval_backward",
)


def test_every_operator_is_checked():
    assert sorted(FORWARD + OTHERS) == sorted(ops.OPERATORS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_operators(name, requires_grad, layout, device):
    form = "dual_relu" if name.startswith("dual") else "bn_add_relu"
    case = _case(form, "eval" not in name, layout, device)
    torch.library.opcheck(getattr(OPS, name).default, _forward_arguments(name, case, requires_grad))


@pytest.mark.parametrize("form", ["bn", "bn_relu", "bn_add", "dual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_operators_without_a_mask(training, form, device):
    case = _case(form, training, "contiguous", device, torch.bfloat16)
    name = ("dual_" if "dual" in form else "") + "batch_norm_add_relu_" + ("train" if training else "eval")
    torch.library.opcheck(getattr(OPS, name).default, _forward_arguments(name, case, True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_operators(name, layout, device):
    form = "dual_relu" if name.startswith("dual") else "bn_add_relu"
    case = _case(form, "eval" not in name, layout, device)
    torch.library.opcheck(getattr(OPS, name).default, _other_arguments(name, case))


@pytest.mark.parametrize("shape", [(4, 9), (2, 9, 7), (0, 9, 2, 2), (3, 9, 1, 1), (2, 9, 2, 3, 2)], ids=str)
def test_fake_kernels_of_other_shapes(shape, device):
    case = oracle.make_case(shape, torch.float32, device)
    for name in ("batch_norm_add_relu_train", "add_relu"):
        torch.library.opcheck(
            getattr(OPS, name).default,
            _forward_arguments(name, case),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("layout", sorted(oracle.LAYOUTS))
@pytest.mark.parametrize("name", FORWARD)
def test_fake_kernels_of_other_layouts(name, layout, device):
    """Strides of results too; a graph that was traced would be wrong otherwise."""
    form = "dual_relu" if name.startswith("dual") else "bn_add_relu"
    case = _case(form, "eval" not in name, layout, device)
    a = case.branches[0]
    arguments = tuple(a.input if i == 0 else v for i, v in enumerate(_forward_arguments(name, case)))
    torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=("test_faketensor",))


def _has_format(name):
    return getattr(OPS, name).default._schema.arguments[-1].name == "channels_last"


def _with_format(op, arguments, channels_last):
    """The arguments up to ``channels_last``, and that."""
    absent = (None,) * (len(op._schema.arguments) - 1 - len(arguments))
    return (*arguments, *absent, channels_last)


# Where C is 1, or there is one position, dense strides fit both formats.
@pytest.mark.parametrize("shape", [SHAPE, (3, 1, 4, 5), (4, 9, 1, 1), (2, 8, 2, 2, 2), (4, 9)], ids=str)
@pytest.mark.parametrize("wanted", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", [n for n in FORWARD + OTHERS if _has_format(n)])
def test_format_that_is_asked_for(name, wanted, shape, device):
    """Whatever the strides of the operands, results are those of operands in that format, to the bit and the stride."""
    op = getattr(OPS, name).default
    form = "dual_relu" if name.startswith("dual") else "bn_add_relu"
    layout = "channels_last" if wanted else "contiguous"
    case = oracle.make_case(shape, torch.float32, device, form, "eval" not in name, layout)
    # A channel of size 1 has a stride of its own in each format.
    format = ops.layout.format_of(case.branches[0].input, wanted)
    arguments = _forward_arguments(name, case) if name in FORWARD else _other_arguments(name, case)
    if "backward" in name:
        # The mask has the meaning that it has in this format.
        forward = "add_relu" if name == "add_relu_backward" else name.split("_backward")[0]
        if forward == "batch_norm_add_relu":  # ..._backward_reduce and ..._backward_apply
            forward += "_apply"
        made = getattr(OPS, forward).default
        mask = made(*_with_format(made, _forward_arguments(forward, case), wanted))[-1]
        place = [argument.name for argument in op._schema.arguments].index("mask")
        arguments = (*arguments[:place], mask, *arguments[place + 1 :])
    results = []
    converts = [convert for layout, convert in oracle.LAYOUTS.items() if "expanded" not in layout]
    for convert in (lambda t: t.contiguous(memory_format=format), *converts):
        moved = [convert(a) if isinstance(a, torch.Tensor) and tuple(a.shape) == shape else a for a in arguments]
        results.append(op(*_with_format(op, moved, wanted)))
    expected, *others = [r if isinstance(r, tuple) else (r,) for r in results]
    for other in others:
        for ours, theirs in zip(other, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()
    like = torch.empty(shape).contiguous(memory_format=format)
    assert all(r.is_contiguous(memory_format=format) for r in expected if r.shape == like.shape)
    torch.library.opcheck(op, _with_format(op, arguments, wanted), test_utils=("test_schema", "test_faketensor"))
