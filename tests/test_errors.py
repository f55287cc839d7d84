"""What is refused: with torch's type of error, by the argument's name, before anything is written."""

import pytest
import torch
import torch.nn.functional as F
from oracle import OPS

from resnet_fused import functional

SHAPE = (2, 3, 4, 4)


def _arguments(device, **changed):
    arguments = {
        "input": torch.randn(SHAPE, device=device),
        "running_mean": torch.zeros(3, device=device),
        "running_var": torch.ones(3, device=device),
        "weight": torch.ones(3, device=device),
        "bias": torch.zeros(3, device=device),
        "residual": None,
        "training": True,
    }
    return arguments | {name: value(device) if callable(value) else value for name, value in changed.items()}


def _unfused(input, running_mean, running_var, weight, bias, residual, training, momentum=0.1, eps=1e-5, relu=True):
    """The operations apart; the residual is not broadcast and its layout not converted."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        if isinstance(residual, torch.Tensor) and (residual.shape != output.shape or residual.layout != output.layout):
            raise RuntimeError("residual")
        output = output + residual
    return F.relu(output) if relu else output


def _snapshot(arguments):
    return {
        name: arguments[name].clone()
        for name in ("running_mean", "running_var")
        if isinstance(arguments[name], torch.Tensor)
        and arguments[name].device.type != "meta"
        and not arguments[name].is_sparse
    }


def _assert_untouched(arguments, before):
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was written"


def of(*shape, dtype=torch.float32):
    """A tensor of this shape and dtype, once the device is known."""
    return lambda device: torch.ones(shape, device=device).to(dtype)


def elsewhere(*shape):
    """A tensor that is not on the device."""
    return lambda device: torch.ones(shape, device="meta")


def sparse(*shape):
    """A tensor of another layout."""
    return lambda device: torch.ones(shape, device=device).to_sparse()


# Each: what differs from a good call, and a word that the message must have.
BAD = {
    "input of one dimension": ({"input": of(3)}, "running_mean"),
    "no input": ({"input": None}, ".*"),
    "input that is no tensor": ({"input": [1.0, 2.0]}, ".*"),
    "more channels than parameters": ({"input": of(2, 5, 4, 4)}, "weight"),
    "weight of another size": ({"weight": of(4)}, "weight"),
    "bias of another size": ({"bias": of(4)}, "bias"),
    "running_mean of another size": ({"running_mean": of(4)}, "running_mean"),
    "running_var of another size": ({"running_var": of(4)}, "running_var"),
    "integer input": ({"input": of(*SHAPE, dtype=torch.int32)}, "input"),
    "byte input": ({"input": of(*SHAPE, dtype=torch.uint8)}, "input"),
    "boolean input": ({"input": of(*SHAPE, dtype=torch.bool)}, "input"),
    "complex input": ({"input": of(*SHAPE, dtype=torch.complex64)}, "input"),
    "integer weight": ({"weight": of(3, dtype=torch.int64)}, "weight"),
    "boolean bias": ({"bias": of(3, dtype=torch.bool)}, "bias"),
    "integer running_mean": ({"running_mean": of(3, dtype=torch.int32)}, "running_mean"),
    "complex running_var": ({"running_var": of(3, dtype=torch.complex64)}, "running_var"),
    "float64 weight": ({"weight": of(3, dtype=torch.float64)}, "weight"),
    "bfloat16 weight": ({"weight": of(3, dtype=torch.bfloat16)}, "weight"),
    "bfloat16 bias alone": ({"bias": of(3, dtype=torch.bfloat16)}, "bias"),
    "float64 running_var": ({"running_var": of(3, dtype=torch.float64)}, "running_var"),
    "float64 input with float32 parameters": ({"input": of(*SHAPE, dtype=torch.float64)}, "weight"),
    "float16 parameters of bfloat16 input": (
        {"input": of(*SHAPE, dtype=torch.bfloat16), "weight": of(3, dtype=torch.float16)},
        "weight",
    ),
    "parameters of two dtypes": (
        {"input": of(*SHAPE, dtype=torch.bfloat16), "bias": of(3, dtype=torch.bfloat16)},
        "bias",
    ),
    "statistics of another dtype than the parameters": (
        {"input": of(*SHAPE, dtype=torch.bfloat16), "running_var": of(3, dtype=torch.bfloat16)},
        "running_var",
    ),
    "weight elsewhere": ({"weight": elsewhere(3)}, "weight"),
    "bias elsewhere": ({"bias": elsewhere(3)}, "bias"),
    "running_mean elsewhere": ({"running_mean": elsewhere(3)}, "running_mean"),
    "input elsewhere": ({"input": elsewhere(*SHAPE)}, "device"),
    "residual elsewhere": ({"residual": elsewhere(*SHAPE)}, "residual"),
    "residual that would be broadcast": ({"residual": of(1, 3, 4, 4)}, "residual"),
    "residual that is a number": ({"residual": of()}, "residual"),
    "residual of more dimensions": ({"residual": of(1, *SHAPE)}, "residual"),
    "residual of another size": ({"residual": of(2, 3, 4, 5)}, "residual"),
    "sparse residual": ({"residual": sparse(*SHAPE)}, "residual"),
    "sparse input": ({"input": sparse(*SHAPE)}, "Sparse"),
    "complex residual": ({"residual": of(*SHAPE, dtype=torch.complex64)}, "residual"),
    "residual that cannot be promoted": ({"residual": of(*SHAPE, dtype=torch.float8_e4m3fn)}, "residual"),
    "residual that is no tensor": ({"residual": [1.0]}, "residual"),
    "weight that is no tensor": ({"weight": [1.0] * 3}, "weight"),
    "bias that is no tensor": ({"bias": 0.5}, "bias"),
    "running_var that is no tensor": ({"running_var": [1.0] * 3}, "running_var"),
    "momentum that is no number": ({"momentum": "a tenth"}, "momentum"),
    "no momentum": ({"momentum": None}, "momentum"),
    "eps that is no number": ({"eps": "little"}, ".*"),
    "eps below zero": ({"eps": -1.0}, "eps"),
    "running statistics that require gradients": (
        {"running_mean": lambda device: torch.zeros(3, device=device, requires_grad=True)},
        ".*",
    ),
}
BAD_IN_TRAINING = {
    "one value a channel": ({"input": of(1, 3, 1, 1)}, "Expected more than 1 value per channel"),
    "one value a channel of two dimensions": ({"input": of(1, 3)}, "Expected more than 1 value per channel"),
    "eps of zero": ({"eps": 0.0}, "eps"),
    "running_mean alone": ({"running_var": None}, "running_mean"),
    "running_var alone": ({"running_mean": None}, "running_var"),
    "no dimension": ({"input": of()}, ".*"),
}
BAD_IN_EVALUATION = {
    "no running statistics": ({"running_mean": None, "running_var": None}, "running_mean"),
    "no running_mean": ({"running_mean": None}, "running_mean"),
    "no running_var": ({"running_var": None}, "running_var"),
}
TABLE = [
    *((name, training) for training in (True, False) for name in BAD),
    *((name, True) for name in BAD_IN_TRAINING),
    *((name, False) for name in BAD_IN_EVALUATION),
]
ALL = BAD | BAD_IN_TRAINING | BAD_IN_EVALUATION


def _name(value) -> str:
    return value if isinstance(value, str) else "train" if value else "eval"


@pytest.mark.parametrize(("name", "training"), TABLE, ids=_name)
def test_refusals(name, training, device):
    changed, word = ALL[name]
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (whatever torch raises is what is expected)
        _unfused(**_arguments(device, **changed, training=training))
    arguments = _arguments(device, **changed, training=training)
    before = _snapshot(arguments)
    with pytest.raises(theirs.type, match=word):
        functional.batch_norm_add_relu(**arguments)
    _assert_untouched(arguments, before)


# The second input is to the first what a residual is: SECOND has what is refused of it.
TABLE_OF_TWO = [
    (name, training, branch)
    for name, training in TABLE
    for branch in ("first", "second")
    if "residual" not in ALL[name][0] and (branch == "first" or "input" not in ALL[name][0])
]


@pytest.mark.parametrize(("name", "training", "branch"), TABLE_OF_TWO, ids=_name)
def test_refusals_of_two_branches(name, training, branch, device):
    """Whichever branch is refused, neither has written its statistics."""
    changed, _ = ALL[name]
    good, bad = _arguments(device, training=training), _arguments(device, **changed, training=training)
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (whatever torch raises is what is expected)
        _unfused(**_arguments(device, **changed, training=training))
    first, second = (bad, good) if branch == "first" else (good, bad)
    if isinstance(first["input"], torch.Tensor) and first["input"].layout == torch.strided:
        second["input"] = torch.ones_like(first["input"])
    options = {key: value for key, value in bad.items() if key in ("momentum", "eps")}
    if branch == "second":
        options = {f"{key}2": value for key, value in options.items()}
    before = [_snapshot(first), _snapshot(second)]
    names = ("input", "running_mean", "running_var", "weight", "bias")
    with pytest.raises((theirs.type, RuntimeError) if "input" in changed else theirs.type):
        functional.dual_batch_norm_add_relu(
            *[first[n] for n in names], *[second[n] for n in names], training=training, **options
        )
    for arguments, values in zip((first, second), before, strict=True):
        _assert_untouched(arguments, values)


SECOND = {
    "shape": (of(2, 3, 4, 5), RuntimeError),
    "broadcast": (of(1, 3, 4, 4), RuntimeError),
    "device": (elsewhere(*SHAPE), RuntimeError),
    "layout": (sparse(*SHAPE), RuntimeError),
    "list": ([1.0], TypeError),
    "complex": (of(*SHAPE, dtype=torch.complex64), NotImplementedError),
    "integers": (of(*SHAPE, dtype=torch.int32), NotImplementedError),
}


@pytest.mark.parametrize("name", sorted(SECOND))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_input(training, name, device):
    value, error = SECOND[name]
    first, second = _arguments(device), _arguments(device, input=value)
    before = [_snapshot(first), _snapshot(second)]
    names = ("input", "running_mean", "running_var", "weight", "bias")
    with pytest.raises(error, match="input2"):
        functional.dual_batch_norm_add_relu(*[first[n] for n in names], *[second[n] for n in names], training=training)
    for arguments, values in zip((first, second), before, strict=True):
        _assert_untouched(arguments, values)


@pytest.mark.parametrize(
    ("residual", "error"),
    [
        (of(1, 3, 4, 4), RuntimeError),
        (of(2, 3, 4, 5), RuntimeError),
        (elsewhere(*SHAPE), RuntimeError),
        (sparse(*SHAPE), RuntimeError),
        (of(*SHAPE, dtype=torch.complex64), NotImplementedError),
        (1.0, TypeError),
        (None, TypeError),
    ],
    ids=["broadcast", "shape", "device", "layout", "complex", "number", "none"],
)
def test_add_relu(residual, error, device):
    residual = residual(device) if callable(residual) else residual
    with pytest.raises(error, match="residual"):
        functional.add_relu(torch.ones(SHAPE, device=device), residual)


def test_no_kernels_of_their_own_is_no_reason_to_refuse(device):
    """What torch takes and the operator has no kernels for, torch's operations do: nothing is refused that worked."""
    arguments = _arguments(device, weight=of(1, 3), bias=of(3, 1))
    expected = _unfused(**_arguments(device, weight=of(1, 3), bias=of(3, 1), input=arguments["input"]))
    assert torch.equal(functional.batch_norm_add_relu(**arguments), expected)
    input, residual = (torch.randint(-4, 4, SHAPE, device=device) for _ in range(2))
    assert torch.equal(functional.add_relu(input, residual), (input + residual).relu())
    meta = _arguments("meta", residual=of(*SHAPE))
    assert functional.batch_norm_add_relu(**meta).shape == torch.Size(SHAPE)


def test_evaluation_with_an_eps_of_zero(device):
    arguments = _arguments(device, training=False) | {"eps": 0.0}
    torch.testing.assert_close(functional.batch_norm_add_relu(**arguments), arguments["input"].relu(), rtol=0, atol=0)


# The operators themselves.


def _train(device, **changed):
    arguments = {
        "input": torch.randn(SHAPE, device=device),
        "weight": torch.ones(3, device=device),
        "bias": torch.zeros(3, device=device),
        "residual": torch.randn(SHAPE, device=device),
        "eps": 1e-5,
        "relu": True,
        "save_mask": True,
    }
    return arguments | {name: value(device) for name, value in changed.items()}


DIRECT = {
    "input of one dimension": ({"input": of(3)}, "input"),
    "integer input": ({"input": of(*SHAPE, dtype=torch.int32)}, "input"),
    "weight of another size": ({"weight": of(4)}, "weight"),
    "weight of two dimensions": ({"weight": of(1, 3)}, "weight"),
    "weight of another dtype": ({"weight": of(3, dtype=torch.float64)}, "weight"),
    "bias of another size": ({"bias": of(2)}, "bias"),
    "residual of another size": ({"residual": of(2, 3, 4, 5)}, "residual"),
    "residual of another dtype": ({"residual": of(*SHAPE, dtype=torch.bfloat16)}, "residual"),
}


@pytest.mark.parametrize("fake", [False, True], ids=["kernel", "fake"])
@pytest.mark.parametrize("name", sorted(DIRECT))
def test_operator_refusals(name, fake, device):
    """A kernel reads raw memory: it must not trust its caller. The fake kernel says the same, in the same words."""
    changed, word = DIRECT[name]
    with pytest.raises(RuntimeError, match=word):
        OPS.batch_norm_add_relu_train(**_train("meta" if fake else device, **changed))


@pytest.mark.parametrize("fake", [False, True], ids=["kernel", "fake"])
def test_backward_operator_refusals(fake, device):
    arguments = _train(device)
    output, mean, _, invstd, mask = OPS.batch_norm_add_relu_train(**arguments)

    def backward(**changed):
        given = {
            "grad_output": torch.ones_like(output),
            "input": arguments["input"],
            "weight": arguments["weight"],
            "bias": arguments["bias"],
            "mean": mean,
            "invstd": invstd,
            "mask": mask,
        } | changed
        if fake:
            given = {name: value.to("meta") for name, value in given.items()}
        return OPS.batch_norm_add_relu_train_backward(**given, relu=True, **needs)

    needs = {f"needs_{name}_grad": True for name in ("input", "residual", "weight", "bias")}
    backward()
    for name, value in (
        ("grad_output", output[:1]),
        ("grad_output", output.double()),
        ("mask", mask[:-1]),
        ("mask", mask.float()),
        ("mean", mean[:-1]),
    ):
        with pytest.raises(RuntimeError, match=name):
            backward(**{name: value})


def test_add_relu_operator_refusals(device):
    input = torch.ones(SHAPE, device=device)
    with pytest.raises(RuntimeError, match="residual"):
        OPS.add_relu(input, input[:1], True)
    with pytest.raises(RuntimeError, match="residual"):
        OPS.add_relu(input, input.double(), True)
    with pytest.raises(RuntimeError, match="input"):
        OPS.add_relu(input.int(), input.int(), True)
    with pytest.raises(RuntimeError, match="mask"):
        OPS.add_relu_backward(input, torch.zeros(1, 3, dtype=torch.uint8, device=device))


@pytest.mark.parametrize("dims", [64, 65, 100])
def test_many_dimensions(dims, device):
    """torch's own operations take more than 64 dimensions where no strides have to be merged, the operators do not."""
    shape = (2, 3, *[1] * (dims - 3), 5)
    input, residual, weight = (torch.randn(s, device=device, requires_grad=True) for s in (shape, shape, 3))
    if dims > 64:
        with pytest.raises(RuntimeError, match=f"input must have at most 64 dimensions, got {dims}"):
            torch.ops.resnet_fused.add_relu(input.detach(), residual.detach(), True)
        with pytest.raises(RuntimeError, match=f"input must have at most 64 dimensions, got {dims}"):
            torch.ops.resnet_fused.batch_norm_statistics(input.detach())
        with pytest.raises(RuntimeError, match=f"grad_output must have at most 64 dimensions, got {dims}"):
            torch.ops.resnet_fused.add_relu_backward(
                input.detach(), torch.zeros(1, 4, dtype=torch.uint8, device=device)
            )
    # The functional forms give torch's result all the same.
    operands = [input, residual, weight]
    for ours, theirs in (
        (functional.add_relu(input, residual), F.relu(input + residual)),
        (
            functional.batch_norm_add_relu(input, None, None, weight, None, residual, training=True),
            F.relu(F.batch_norm(input, None, None, weight, None, training=True) + residual),
        ),
        (
            functional.dual_batch_norm_add_relu(
                input, None, None, weight, None, residual, None, None, weight, training=True
            ),
            F.relu(
                F.batch_norm(input, None, None, weight, None, training=True)
                + F.batch_norm(residual, None, None, weight, None, training=True)
            ),
        ),
    ):
        torch.testing.assert_close(ours.flatten(), theirs.flatten())
        grads = torch.autograd.grad(ours.square().sum(), operands, allow_unused=True)
        expected = torch.autograd.grad(theirs.square().sum(), operands, allow_unused=True)
        for grad, value in zip(grads, expected, strict=True):
            if value is not None:
                torch.testing.assert_close(grad.flatten(), value.flatten())
