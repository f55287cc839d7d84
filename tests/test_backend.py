"""Choosing a backend, and the reference that every backend repeats."""

import os
import subprocess
import sys

import oracle
import pytest
import torch
from oracle import OPS
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import functional, ops
from resnet_fused.ops import backend, reference


class _Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _operators_of(*arguments, **keywords):
    with _Operators() as recorded:
        functional.batch_norm_add_relu(*arguments, **keywords)
    return recorded.names


def _arguments(device):
    return torch.randn(2, 3, 4, 4, device=device), torch.zeros(3, device=device), torch.ones(3, device=device)


def test_auto_runs_the_fused_operator(device):
    assert backend.current() == "auto"
    names = _operators_of(*_arguments(device), training=True)
    assert [name for name in names if name.startswith("resnet_fused::batch_norm_add_relu_train")]
    assert not [name for name in names if "native_batch_norm" in name]


def test_reference_runs_the_unfused_operations(device):
    arguments = _arguments(device)
    with backend.backend("reference"):
        assert backend.current() == "reference"
        names = _operators_of(*arguments, training=True)
        assert not [name for name in names if name.startswith("resnet_fused")]
    assert backend.current() == "auto"


def test_compiled_serves_its_devices(device):
    with backend.backend("compiled"):
        assert "resnet_fused::batch_norm_add_relu_eval" in _operators_of(*_arguments(device))


def test_asking_for_compiled_where_it_cannot_run_says_why():
    with backend.backend("compiled"), pytest.raises(RuntimeError, match="no compiled kernels for meta"):
        functional.batch_norm_add_relu(*_arguments("meta"), training=True)
    assert backend.why_not_compiled(torch.device("cpu")) is None


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="must be one of auto, compiled, triton, reference, got 'fast'"),
        backend.backend("fast"),
    ):
        pass
    assert backend.current() == "auto"


def test_the_choice_ends_with_an_error():
    with pytest.raises(KeyError), backend.backend("reference"):
        raise KeyError
    assert backend.current() == "auto"


def test_choices_nest():
    with backend.backend("reference"):
        with backend.backend("compiled"):
            assert backend.current() == "compiled"
        assert backend.current() == "reference"


@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("", "auto")])
def test_environment(value, expected):
    assert _imported(value) == (0, expected)


def test_environment_with_an_unknown_backend():
    status, message = _imported("fast")
    assert status != 0
    assert "RESNET_FUSED_BACKEND must be one of auto, compiled, triton, reference, got 'fast'" in message


def _imported(value):
    command = "from resnet_fused.ops import backend; print(backend.current())"
    environment = os.environ | {"RESNET_FUSED_BACKEND": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip() if done.returncode == 0 else done.stderr


def test_every_operator_has_kernels_of_the_backend(device):
    """Nothing runs the reference and calls itself fused."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device.type]
    missing = [
        n for n in ops.OPERATORS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fused::{n}", key)
    ]
    assert not missing


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_reference_backend_gives_torchs_own_results(training, device):
    for form in oracle.FORMS:
        case = oracle.make_case((2, 5, 4, 3), torch.float32, device, form, training)
        expected = oracle.unfused(case)
        with backend.backend("reference"):
            results = oracle.fused(case)
        for name, value in results.items():
            # A second branch is normalized first here, as a residual; the sum of two is the same.
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", oracle.FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(2, 9, 5, 3), (4, 9), (2, 8, 7), (3, 9, 1, 1), (0, 3, 2, 2)], ids=str)
def test_reference_repeats_the_kernels(shape, training, form, layout, device):
    """Operator by operator: values, shapes, strides and the mask's bits. Double backward and graphs rest on it."""
    case = oracle.make_case(shape, torch.float64, device, form, training, layout)
    with _Recording() as recorded:
        oracle.fused(case)
    assert len(recorded.calls) >= 2
    for name, arguments, results in recorded.calls:
        expected = getattr(reference, name)(*arguments)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, other in zip(results, expected, strict=True):
            assert _strides(ours) == _strides(other), name
            # Sums of at most thirty float64 numbers of the order of ten.
            torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


def _strides(tensor):
    """The strides that an element's place depends on."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


class _Recording(TorchDispatchMode):
    """Records the calls of our operators that return something, with copies of nothing: they are functional."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "resnet_fused" and results is not None:
            name = func._schema.name.removeprefix("resnet_fused::")
            self.calls.append((name, args, results if isinstance(results, tuple) else (results,)))
        return results


def test_operators_on_meta_tensors():
    output, mask = OPS.add_relu(torch.ones(2, 3, device="meta"), torch.ones(2, 3, device="meta"), True)
    assert output.device.type == mask.device.type == "meta"


HEAVY = ("torch._dynamo", "torch._inductor", "torch.onnx", "triton", "sympy", "matplotlib", "torchvision", "timm")


def test_importing_brings_nothing_heavy():
    """Dynamo takes a second and 160 MB: who compiles nothing need not wait for it."""
    command = f"""
import sys, torch
before = {{name for name in {HEAVY} if name in sys.modules}}
import resnet_fused
print(sorted({{name for name in {HEAVY} if name in sys.modules}} - before))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RESNET_FUSED_BACKEND", None)  # Triton where it is asked for
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_choice_is_a_constant_of_what_is_compiled(device):
    """Of the choice at the time of tracing, and of the backend that serves the device."""
    arguments = _arguments(device)
    expected = functional.batch_norm_add_relu(*arguments)
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    for choice in ("auto", "compiled", "reference"):
        torch.compiler.reset()
        run = torch.compile(lambda x: functional.batch_norm_add_relu(x, *arguments[1:]), fullgraph=True, backend=keep)
        with backend.backend(choice):
            torch.testing.assert_close(run(arguments[0]), expected)
        assert ("resnet_fused" in graphs[-1]) == (choice != "reference")
    assert len(graphs) == 3
