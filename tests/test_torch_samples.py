"""PyTorch's own sample inputs and error inputs for batch norm, run through the fused operator."""

import copy
import inspect

import oracle
import pytest
import torch
import torch.nn.functional as F

from resnet_fused import functional
from resnet_fused.modules import BatchNormAddReLU2d

pytest.importorskip("expecttest", reason="torch's samples import expecttest, which is not installed")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

FUNCTIONAL = [op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name]
NATIVE = [op for op in op_db if op.name == "native_batch_norm"]
MODULES = [info for info in module_db if info.module_cls.__name__ in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")]


def test_the_databases_have_what_is_tested():
    assert len(FUNCTIONAL) == len(NATIVE) == 1
    assert len(MODULES) == 3


def _case(input, running_mean, running_var, weight, bias, training, momentum, eps, relu):
    def plain(tensor):
        return None if tensor is None else tensor.detach()

    branch = oracle.Branch(
        plain(input), plain(weight), plain(bias), plain(running_mean), plain(running_var), momentum, eps
    )
    grad_output = torch.randn(input.shape, dtype=torch.float64).to(input)
    return oracle.Case([branch], None, grad_output.detach(), training, relu)


def _check(*arguments):
    """The sample without and with the ReLU; where torch refuses it, we refuse it with the same type of error."""
    for relu in (False, True):
        case = _case(*arguments, relu)
        try:
            oracle.unfused(case)
        except Exception as theirs:
            with pytest.raises(type(theirs)):
                oracle.fused(case)
        else:
            if case.branches[0].input.dim() < 2:
                ours, theirs = oracle.fused(case), oracle.unfused(case)
                assert ours["output"].shape == theirs["output"].shape
                assert ours["output"].numel() == 0
            else:
                oracle.check(case)


def _samples(op, dtype, device):
    if dtype not in op.dtypes:
        pytest.skip(f"torch has no samples of {dtype}")
    samples = list(op.sample_inputs(device, dtype, requires_grad=True))
    assert samples
    return samples


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
def test_functional_samples(dtype, device):
    signature = inspect.signature(F.batch_norm)
    for sample in _samples(FUNCTIONAL[0], dtype, device):
        bound = signature.bind(sample.input, *sample.args, **sample.kwargs)
        bound.apply_defaults()
        given = bound.arguments
        _check(*(given[name] for name in signature.parameters))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_name)
def test_native_samples(dtype, device):
    """(input, weight, bias, running_mean, running_var, training, momentum, eps)"""
    for sample in _samples(NATIVE[0], dtype, device):
        weight, bias, running_mean, running_var, training, momentum, eps = sample.args
        _check(sample.input, running_mean, running_var, weight, bias, training, momentum, eps)


def _randomized(module):
    """The module with parameters and statistics that are not ones and zeros."""
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 0.5)
    return module


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_module_samples(info, training, device):
    """What nn.BatchNorm hands to the functional form, over three batches."""
    samples = info.module_inputs_func(info, device, torch.float32, True, training)
    assert samples
    for sample in samples:
        constructor = sample.constructor_input
        module = _randomized(info.module_cls(*constructor.args, **constructor.kwargs).to(device).train(training))
        input = sample.forward_input.args[0].detach()
        for count in range(1, 4):
            tracked = not training or module.track_running_stats
            _check(
                input,
                module.running_mean if tracked else None,
                module.running_var if tracked else None,
                module.weight,
                module.bias,
                training or module.running_mean is None,
                1 / count if module.momentum is None else module.momentum,
                module.eps,
            )
            module(input)
            input = input + torch.randn_like(input)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_module_samples_through_the_module(training, relu, device):
    (info,) = (info for info in MODULES if info.module_cls is torch.nn.BatchNorm2d)
    for sample in info.module_inputs_func(info, device, torch.float32, True, training):
        constructor = sample.constructor_input
        theirs = _randomized(torch.nn.BatchNorm2d(*constructor.args, **constructor.kwargs).to(device).train(training))
        ours = BatchNormAddReLU2d(*constructor.args, **constructor.kwargs, relu=relu).to(device).train(training)
        ours.load_state_dict(theirs.state_dict())
        exact = copy.deepcopy(theirs).double()
        input = sample.forward_input.args[0].detach()
        for _ in range(3):
            outputs = [
                ours(input),
                *(F.relu(m(x)) if relu else m(x) for m, x in ((theirs, input), (exact, input.double()))),
            ]
            # make_tensor's values reach to 9, the largest term of the sums here.
            oracle.assert_as_accurate(*outputs[:2], outputs[2].detach().cpu().numpy(), "output", 9.0)
            state, their_state, exact_state = (module.state_dict() for module in (ours, theirs, exact))
            assert list(state) == list(their_state)
            for name, value in state.items():
                if value.is_floating_point():
                    oracle.assert_as_accurate(value, their_state[name], exact_state[name].cpu().numpy(), name)
                else:
                    assert torch.equal(value, their_state[name]), name
            input = input + torch.randn_like(input)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_module_error_inputs(info, relu, device):
    errors = info.module_error_inputs_func(info, device, torch.float32, False, True)
    assert errors
    for error in errors:
        assert error.error_on is ModuleErrorEnum.FORWARD_ERROR
        constructor, input = error.module_error_input.constructor_input, error.module_error_input.forward_input.args[0]
        module = _randomized(info.module_cls(*constructor.args, **constructor.kwargs).to(device))
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(error.error_type, match=error.error_regex):
            functional.batch_norm_add_relu(
                input,
                module.running_mean,
                module.running_var,
                module.weight,
                module.bias,
                None,
                True,
                eps=module.eps,
                relu=relu,
            )
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
