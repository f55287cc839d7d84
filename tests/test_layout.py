"""Memory formats: of operands, gradients and results, and saved tensors that come back in another one."""

import dataclasses

import oracle
import pytest
import torch
from torch._prims_common import suggest_memory_format

from resnet_fused import functional

ALL = sorted(oracle.LAYOUTS)
SHAPES = ((2, 17, 5, 3), (3, 9), (2, 7, 9), (3, 8, 1, 1), (2, 7, 2, 3, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("form", ["bn_relu", "bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_input_of_any_layout(training, form, layout, shape, device):
    case = oracle.make_case(shape, torch.float32, device, form, training, layout)
    _check_against_contiguous(case)


@pytest.mark.parametrize("residual_layout", ALL)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_channels"])
@pytest.mark.parametrize("form", ["bn_add", "bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=oracle.dtype_name)
def test_residual_of_another_layout(dtype, form, layout, residual_layout, device):
    oracle.check(oracle.make_case((2, 17, 5, 3), dtype, device, form, True, layout, residual_layout))


@pytest.mark.parametrize("gradient_layout", ALL)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", ["bn_add", "bn_relu", "bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("shape", [(2, 17, 5, 3), (3, 9)], ids=str)
def test_gradient_of_any_layout(shape, form, training, layout, gradient_layout, device):
    case = oracle.make_case(shape, torch.float32, device, form, training, layout)
    grad_output = oracle.LAYOUTS[gradient_layout](case.grad_output)
    plain = dataclasses.replace(case, grad_output=grad_output.clone(memory_format=torch.contiguous_format))
    ours = oracle.fused(dataclasses.replace(case, grad_output=grad_output))
    for name, value in oracle.fused(plain).items():
        assert torch.equal(ours[name], value), name


def test_gradient_of_a_sum(device):
    """``sum()`` hands back one number, expanded: every stride is zero."""
    case = oracle.make_case((2, 17, 5, 3), torch.float32, device)
    b = case.branches[0]
    gradients = []
    for expanded in (True, False):
        input = b.input.clone().requires_grad_()
        output = functional.batch_norm_add_relu(input, None, None, b.weight, b.bias, case.residual, True)
        if expanded:
            output.sum().backward()
        else:
            output.backward(torch.ones_like(output))
        gradients.append(input.grad)
    assert torch.equal(*gradients)


def _check_against_contiguous(case: oracle.Case) -> None:
    """The same values, and the same rule, as for a copy without gaps; in memory the results follow the input."""
    ours = oracle.check(case)
    format = suggest_memory_format(case.branches[0].input)
    assert ours["output"].is_contiguous(memory_format=format)
    assert ours["grad_input"].is_contiguous(memory_format=format)


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_direct_operator_results_have_the_memory_format_of_the_input(shape, layout, device):
    for form in ("bn_relu", "bn_add_relu", "dual_relu"):
        case = oracle.make_case(shape, torch.float32, device, form, True, layout)
        output = oracle.operator_results(case)[0]
        expected = torch.empty_like(case.branches[0].input, memory_format=suggest_memory_format(case.branches[0].input))
        assert output.stride() == expected.stride()
        assert output.untyped_storage().nbytes() == output.numel() * output.element_size()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_module_result_of_channels_last_is_channels_last(layout, device):
    """A convolution behind must not have to convert."""
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    input = torch.randn(2, 8, 4, 4, device=device).to(memory_format=format).requires_grad_()
    output = functional.batch_norm_add_relu(input, None, None, training=True)
    assert output.is_contiguous(memory_format=format)
    # Whatever the gradient's layout.
    output.sum().backward()
    assert input.grad.is_contiguous(memory_format=format)


# Saved tensors.


def _drop_memory_format():
    """Hooks that give a saved tensor back with its values and shape, and nothing else of it."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved.clone(memory_format=torch.contiguous_format), lambda packed: packed
    )


def _add_gaps():
    return torch.autograd.graph.saved_tensors_hooks(
        lambda saved: oracle.LAYOUTS["sliced_positions"](saved) if saved.dim() > 2 else saved, lambda packed: packed
    )


def _add_gaps_everywhere():
    """Also to masks and to vectors of channels."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda saved: torch.stack([saved, torch.zeros_like(saved)], -1)[..., 0], lambda packed: packed
    )


def _transpose():
    return torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1),
        lambda packed: packed,
    )


HOOKS = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "contiguous": _drop_memory_format,
    "gaps": _add_gaps,
    "gaps everywhere": _add_gaps_everywhere,
    "transposed": _transpose,
}


@pytest.mark.parametrize("hooks", sorted(HOOKS))
@pytest.mark.parametrize("route", ["functional", "operator"])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_saved_tensors_in_another_memory_format(layout, training, form, route, hooks, device):
    """The mask was written for the input's layout, which it must meet again."""
    case = oracle.make_case(
        (2, 17, 5, 3), torch.float32, device, form, training, layout, residual_layout="channels_last"
    )
    expected = oracle.fused(case, route)
    with HOOKS[hooks]():
        ours = oracle.fused(case, route)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


def test_what_is_saved(device):
    """With a residual and the ReLU: the input, vectors, and a bit an element; not the output, not the residual."""
    case = oracle.make_case((4, 16, 8, 8), torch.float32, device)
    b = case.branches[0]
    input = b.input.clone().requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.batch_norm_add_relu(input, None, None, b.weight, b.bias, case.residual, True)
    large = [tensor for tensor in saved if tensor.dim() > 1 and tensor.dtype != torch.uint8]
    assert [tensor.data_ptr() for tensor in large] == [input.data_ptr()]
    assert [tensor.numel() for tensor in saved if tensor.dtype == torch.uint8] == [input.numel() // 8]

    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.batch_norm_add_relu(input, None, None, b.weight, b.bias, training=True)
    assert [tensor.data_ptr() for tensor in saved if tensor.dim() > 1] == [input.data_ptr()]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gradient_layout", ALL)
def test_add_relu_gradient_of_any_layout(gradient_layout, layout, device):
    """Its mask follows the output's memory order, whatever that of the gradient."""
    input, residual = (
        oracle.LAYOUTS[layout](torch.randn(2, 17, 5, 3, device=device)).requires_grad_() for _ in range(2)
    )
    output = functional.add_relu(input, residual)
    grad_output = oracle.LAYOUTS[gradient_layout](torch.randn(2, 17, 5, 3, device=device))
    output.backward(grad_output)
    assert torch.equal(input.grad, grad_output.where(output > 0, 0))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 8, 1, 1), (1, 1, 1, 8), (2, 1, 1, 1), (1, 8, 2, 1)], ids=str)
@pytest.mark.parametrize("layout", ALL)
def test_shapes_whose_memory_format_is_ambiguous(layout, shape, device):
    """Dimensions of size one leave strides free: one tensor is contiguous and channels_last at once."""
    for form in ("bn_add_relu", "dual_relu"):
        oracle.check(
            oracle.make_case(shape, torch.float32, device, form, False, layout, residual_layout="channels_last")
        )


@pytest.mark.parametrize("offset", range(1, 9))
def test_input_at_any_address(offset, device, backend_name):
    """Vector loads must not ask for alignment that a slice of a storage does not have.

    The CPU library gives the same bits then. On a GPU what is not aligned is read by threads of one value each, which
    add up in another order: each keeps the rule.
    """
    for layout in ("contiguous", "channels_last"):
        case = oracle.make_case((2, 16, 4, 4), torch.float32, device, layout=layout)
        aligned = oracle.fused(case)

        def shifted(tensor):
            storage = tensor.new_empty(tensor.numel() + offset)
            view = storage[offset:].as_strided(tensor.shape, tensor.stride())
            return view.copy_(tensor)

        case = oracle.like(case, shifted)
        if backend_name != "compiled":
            oracle.check(case)
            continue
        for name, value in oracle.fused(case).items():
            assert torch.equal(value, aligned[name]), name


def test_offsets_beyond_two_to_the_31_elements(device, memory_as_it_comes):
    """Vectors whose second value lies more than 2^31 elements behind the first."""
    distance = 2**31 + 3
    try:
        with memory_as_it_comes():
            storage = torch.empty(distance + 1, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("needs 4 GiB of address space")

    def far(vector):
        return storage.as_strided((2,), (distance,)).copy_(vector)

    for training in (True, False):
        for layout in ("contiguous", "channels_last"):
            case = oracle.make_case(
                (4, 2, 5, 3), torch.bfloat16, device, "bn_add_relu", training, layout, parameters=torch.bfloat16
            )
            expected = oracle.fused(case)
            (branch,) = case.branches
            for name in ("weight", "bias"):
                changed = dataclasses.replace(branch, **{name: far(getattr(branch, name))})
                results = oracle.fused(dataclasses.replace(case, branches=[changed]))
                for key, value in results.items():
                    assert torch.equal(value, expected[key]), (name, key)
