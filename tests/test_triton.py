"""The Triton kernels beyond values: masks others read, plans, choice, graphs, and a package without compiled libraries.

Values, gradients and refusals are the other files' tests, with ``--backend triton`` or ``--backend ptx``.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import oracle
import pytest
import torch
from oracle import OPS

from resnet_fused import ops
from resnet_fused.ops import backend, triton_kernels

ROOT = pathlib.Path(__file__).resolve().parent.parent

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: `pip install triton`", allow_module_level=True)

from resnet_fused.triton import configurations  # noqa: E402
from resnet_fused.triton.configurations import Device, Problem  # noqa: E402

triton_only = pytest.mark.skipif(
    "config.getoption('--backend') not in ('triton', 'ptx')", reason="runs Triton kernels: `make test-triton`"
)
ptx_only = pytest.mark.skipif(
    "config.getoption('--backend') != 'ptx'", reason="traces compiled Triton kernels: `make test-triton`"
)
H100 = Device(132)


def _run(program, *options, **environment):
    """A Python program in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = [sys.executable, *options, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip() if done.returncode == 0 else done.stderr


# Registration and choice.


def test_every_operator_has_a_launcher_of_its_signature():
    import inspect

    from resnet_fused.triton import launchers

    for name in ops.OPERATORS:
        schema = getattr(OPS, name).default._schema
        parameters = inspect.signature(getattr(launchers, name)).parameters.values()
        names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
        assert [a.name for a in schema.arguments][: len(names)] == names, name
        rest = [a.name for a in schema.arguments][len(names) :]
        assert all(argument.startswith("needs_") or argument in ("grad_output2", "channels_last") for argument in rest)


def test_importing_the_package_imports_no_kernel():
    program = """
import sys, resnet_fused
print([name for name in sys.modules if name.startswith("resnet_fused.triton")])"""
    assert _run(program) == (0, "[]")


def test_importing_the_package_where_triton_is_not_installed():
    program = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch, resnet_fused
from resnet_fused.ops import backend, triton_kernels
assert not any(triton_kernels.serves(kind) for kind in triton_kernels.KEYS)
x = torch.ones(2, 3, 4, 4)
resnet_fused.functional.batch_norm_add_relu(x, None, None, training=True)
with backend.backend("triton"):
    try:
        resnet_fused.functional.batch_norm_add_relu(x, None, None, training=True)
    except RuntimeError as error:
        print(error)"""
    status, printed = _run(program, TRITON_INTERPRET="0")
    assert status == 0, printed
    assert printed == "the backend 'triton' was asked for, but Triton is not installed: `pip install triton`"


def test_asking_for_triton_on_the_cpu_says_what_it_needs():
    program = """
import torch, resnet_fused
x = torch.ones(2, 3, 4, 4)
try:
    resnet_fused.functional.batch_norm_add_relu(x, None, None, training=True)
except RuntimeError as error:
    print(error)"""
    status, printed = _run(program, RESNET_FUSED_BACKEND="triton", TRITON_INTERPRET="0")
    assert status == 0, printed
    assert "TRITON_INTERPRET=1" in printed


def test_the_context_manager_has_triton_serve_and_gives_back():
    program = """
import torch, resnet_fused
from resnet_fused import functional
from resnet_fused.ops import backend, triton_kernels
from resnet_fused.triton import launchers
runs = []
launch = launchers._launch
launchers._launch = lambda kernel, *rest: (runs.append(kernel.__name__), launch(kernel, *rest))
x = torch.randn(2, 3, 4, 4)
def step():
    runs.clear()
    functional.batch_norm_add_relu(x, None, None, training=True)
    return len(runs)
counts = [step()]
with backend.backend("triton"):
    counts.append(step())
    with backend.backend("compiled"):
        counts.append(step())
    with backend.backend("reference"):
        counts.append(step())
    counts.append(step())
counts.append(step())
print(counts)"""
    assert _run(program, TRITON_INTERPRET="1", RESNET_FUSED_BACKEND="") == (0, "[0, 2, 0, 0, 2, 0]")


def test_choosing_in_one_thread_disturbs_no_other():
    """Calls go on in two threads while a third enters and leaves, and a fourth keeps the compiled kernels it asked for.

    The launchers are torch's operations here, for Triton's interpreter runs in one thread alone.
    """
    program = """
import threading, torch
from resnet_fused import functional
from resnet_fused.ops import backend, triton_kernels, reference
class Launchers:
    threads = set()
    def __getattr__(self, name):
        self.threads.add(threading.current_thread().name)
        return getattr(reference, name)
triton_kernels._launchers = lambda: launchers
launchers, x, failed, end = Launchers(), torch.randn(2, 3, 4, 4), [], threading.Event()
def call():
    try:
        while not end.is_set():
            functional.batch_norm_add_relu(x.requires_grad_(), None, None, training=True).sum().backward()
    except BaseException as error:
        failed.append(error)
def call_compiled():
    with backend.backend("compiled"):
        call()
threads = [threading.Thread(target=call, name="any") for _ in range(2)]
threads.append(threading.Thread(target=call_compiled, name="compiled"))
for thread in threads:
    thread.start()
for _ in range(500):
    with backend.backend("triton"):
        functional.batch_norm_add_relu(x, None, None, training=True)
end.set()
for thread in threads:
    thread.join()
assert not failed, failed
print("MainThread" in launchers.threads, "compiled" in launchers.threads)"""
    assert _run(program, TRITON_INTERPRET="1", RESNET_FUSED_BACKEND="") == (0, "True False")


def test_triton_serves_gpus_without_a_compiled_library(monkeypatch):
    monkeypatch.setattr(backend, "_why_not_cuda", lambda index: "there is no library")
    monkeypatch.setattr(triton_kernels, "_why_not", lambda kind, index: None)
    served = triton_kernels.serves("cuda")
    backend._serving.cache_clear()
    try:
        assert backend.serving(torch.device("cuda", 0), "auto") == ("triton", "there is no library")
        assert backend.serving(torch.device("cuda", 0), "compiled") == ("reference", "there is no library")
        monkeypatch.setattr(backend, "_why_not_cuda", lambda index: None)
        backend._serving.cache_clear()
        assert backend.serving(torch.device("cuda", 0), "auto") == ("compiled", None)
        assert backend.serving(torch.device("cuda", 0), "triton") == ("triton", None)
    finally:
        backend._serving.cache_clear()
        backend._found.discard("cuda")
        triton_kernels.serve("cuda", served)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "8.0"), ((8, 0), None), ((13, 0), None)])
def test_gpus_that_triton_reaches(capability, expected, monkeypatch):
    monkeypatch.setattr(triton_kernels, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = triton_kernels._why_not.__wrapped__("cuda", 0) if hasattr(triton_kernels._why_not, "__wrapped__") else None
    if not hasattr(triton_kernels._why_not, "__wrapped__"):
        pytest.skip("the emulated backend replaces what is tested")
    assert (reason is None) == (expected is None)
    assert expected is None or expected in reason


# Masks.


@triton_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["bn_add_relu", "dual_relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(2, 17, 5, 3), (4, 9), (3, 16, 1, 1)], ids=str)
def test_masks_of_one_backend_are_read_by_another(shape, training, form, layout, device):
    """Forward here and backward in the CPU library, and the other way round: what passes is the same to the bit."""
    case = oracle.make_case(shape, torch.float32, device, form, training, layout)
    a, needs = case.branches[0], (True, False, True) if form == "dual_relu" else (False, True, False, True)

    def backward(results):
        mask = results[-1]
        statistics = (results[1], results[3]) if training else (a.running_mean, a.running_var)
        if form == "dual_relu":
            b = case.branches[1]
            second = (results[4], results[6]) if training else (b.running_mean, b.running_var)
            start = (case.grad_output, a.input, a.weight, *statistics, b.input, b.weight, *second, mask)
            name = f"dual_batch_norm_add_relu_{'train' if training else 'eval'}_backward"
            return getattr(OPS, name)(*start, *(() if training else (a.eps, b.eps)), True, *needs, *needs)
        start = (case.grad_output, a.input, a.weight, a.bias, *statistics, mask)
        name = f"batch_norm_add_relu_{'train' if training else 'eval'}_backward"
        return getattr(OPS, name)(*start, *(() if training else (a.eps,)), True, *needs)

    def compiled(function, *arguments):
        triton_kernels.serve("cpu", False)
        try:
            return function(*arguments)
        finally:
            triton_kernels.serve("cpu", True)

    ours, theirs = oracle.operator_results(case), compiled(oracle.operator_results, case)
    # Where rounding alone decides, as of a result all but zero, they may differ: not in these cases.
    assert torch.equal(ours[-1], theirs[-1])
    for results in (ours, theirs):
        for value, other in zip(backward(results), compiled(backward, results), strict=True):
            # Sums of at most a hundred float32 terms of the order of one.
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


# Plans.


PROBLEMS = [
    Problem(rows, batch, channels, 1 if rows else positions, itemsize)
    for rows in (True, False)
    for batch in (0, 1, 7, 100_352)
    for channels in (1, 3, 64, 65, 2048)
    for positions in ((1,) if rows else (2, 49, 3136))
    for itemsize in (2, 4, 8)
]


@pytest.mark.parametrize("device", [H100, Device(1), Device(304, 64)], ids=str)
@pytest.mark.parametrize("kind", sorted(configurations.DEFAULTS))
def test_plans_reach_every_element_with_what_devices_allow(kind, device):
    sums = {"statistics": 2, "reduce": 3}.get(kind, 0)
    for problem in PROBLEMS:
        plan = configurations.plan(kind, problem, device, sums)
        for size in (plan.channels, plan.others, plan.warps):
            assert size > 0
            assert size & (size - 1) == 0, problem
        assert plan.groups * plan.channels >= problem.channels
        reached = plan.chunks * plan.others if problem.rows else plan.chunks * plan.others // max(problem.batch, 1)
        assert reached >= (problem.batch if problem.rows else problem.positions * (problem.batch > 0)), problem
        assert plan.warps * device.lanes <= 1024
        assert 1 <= plan.programs <= 65535
        # A byte of the mask belongs to one program.
        assert (plan.channels if problem.rows else plan.others) % 8 == 0
        if sums and plan.programs > 1:
            moved = 2 * 8 * sums * plan.programs * problem.channels
            assert moved <= 0.09 * problem.count * problem.channels * problem.itemsize


def test_plans_of_large_tensors_fill_the_device():
    for problem in (Problem(True, 100_352, 64, 1, 2), Problem(False, 32, 64, 3136, 2), Problem(True, 1568, 2048, 1, 2)):
        for kind, sums in (("statistics", 2), ("forward", 0), ("reduce", 2), ("backward", 0)):
            plan = configurations.plan(kind, problem, H100, sums)
            assert plan.groups * plan.programs >= H100.processors / 3, (kind, problem)


@pytest.mark.parametrize(("size", "unit"), [(0, 16), (1, 1), (6, 2), (24, 8), (64, 16), (49, 1)])
def test_units(size, unit):
    assert configurations.unit_of(size) == unit


def test_autotuning_takes_the_fastest_and_remembers_it(tmp_path, monkeypatch):
    monkeypatch.setattr(configurations, "AUTOTUNE", True)
    monkeypatch.setattr(configurations, "_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(configurations.Cache, "_open", {})
    timed = []

    def time(attempt, chosen):
        attempt(chosen)
        timed.append(chosen)
        return abs(chosen.warps - 8) + len(timed) / 100

    monkeypatch.setattr(configurations, "_time", time)
    problem, cpu = Problem(True, 100_352, 256, 1, 2), torch.device("cpu")
    tried = []
    chosen = configurations.choose("forward", problem, cpu, 0, tried.append)
    assert len(tried) == len(configurations.SEARCHED)
    assert chosen.warps == 8
    assert configurations.choose("forward", problem, cpu, 0, tried.append) == chosen
    # Another process reads it from the file; one that cannot read it searches again.
    monkeypatch.setattr(configurations.Cache, "_open", {})
    assert configurations.choose("forward", problem, cpu, 0, tried.append) == chosen
    assert len(tried) == len(configurations.SEARCHED)
    (file,) = (tmp_path / "cache").iterdir()
    assert list(json.loads(file.read_text()).values()) == [{"warps": 8, "accesses": 1, "resident": 4}]
    for times, broken in enumerate(("{", "[]", '{"a": {"warps": 0, "accesses": 1, "resident": 1}}'), 2):
        file.write_text(broken)
        monkeypatch.setattr(configurations.Cache, "_open", {})
        configurations.choose("forward", problem, cpu, 0, tried.append)
        assert len(tried) == times * len(configurations.SEARCHED)


def test_what_other_processes_found_is_kept(tmp_path):
    one, two = (configurations.Cache(tmp_path / "file") for _ in range(2))
    one.put("a", configurations.SEARCHED[0])
    two.put("b", configurations.SEARCHED[1])
    again = configurations.Cache(tmp_path / "file")
    assert (again.get("a"), again.get("b")) == configurations.SEARCHED[:2]


@triton_only
def test_searching_changes_nothing_but_the_plan(tmp_path, monkeypatch, device):
    """Running statistics are updated once, however often a pass is tried."""
    case = oracle.make_case((2, 17, 5, 3), torch.float32, device)
    expected = oracle.fused(case)
    monkeypatch.setattr(configurations, "AUTOTUNE", True)
    monkeypatch.setattr(configurations, "_directory", lambda: tmp_path)
    monkeypatch.setattr(configurations.Cache, "_open", {})
    monkeypatch.setattr(configurations, "_time", lambda attempt, chosen: [attempt(chosen), attempt(chosen)] and 1.0)
    for name, value in oracle.fused(case).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@triton_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["bn_relu", "bn_add_relu", "dual_relu"])
def test_many_programs_share_a_channel(form, layout, device, monkeypatch):
    """So many that their sums are added up by a launch of its own."""
    monkeypatch.setattr(configurations, "device_of", lambda device: Device(24))
    monkeypatch.setattr(configurations, "_PARTIAL_PASSES", 1e9)
    case = oracle.make_case((8, 3, 48, 32), torch.float32, device, form, layout=layout)
    oracle.check(case)
    assert configurations.plan("statistics", Problem(True, 8 * 48 * 32, 3, 1, 4), Device(24), 2).programs > 16


# Graphs.


@ptx_only
def test_compiled_graphs_have_the_kernels(device):
    """torch.compile sees the launches, forward and backward; export keeps the operator."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    torch.compiler.reset()
    graphs = AotEagerAndRecordGraphs()
    case = oracle.owned(oracle.make_case((2, 9, 5, 3), torch.float32, device))
    torch.compile(oracle.functional_output, fullgraph=True, backend=graphs)(case).sum().backward()
    for recorded in (graphs.fw_graphs, graphs.bw_graphs):
        (graph,) = recorded
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert sum("triton_kernel_wrapper" in target for target in targets) == 2
        assert not [target for target in targets if "add_relu_train" in target]
        # Inductor fills what empty_like makes: a pass over the tensor for nothing.
        assert not [target for target in targets if "empty_like" in target]


@ptx_only
def test_export_keeps_the_operators(device):
    class Module(torch.nn.Module):
        def forward(self, x, residual):
            vectors = torch.zeros(9), torch.ones(9)
            return oracle.batch_norm_add_relu(x, *vectors, None, None, residual)

    x = torch.randn(2, 9, 5, 3, device=device)
    program = torch.export.export(Module(), (x, x)).run_decompositions({})
    targets = [str(node.target) for node in program.graph.nodes]
    assert "resnet_fused.batch_norm_add_relu_eval.default" in targets


# A package without compiled libraries.


def _schemas():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import schemas
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return schemas


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the checkout")
def test_schemas_as_text_are_those_of_the_library():
    schemas = _schemas()
    written = {text.partition("(")[0]: text for text in schemas.read(schemas.SOURCE.read_text(encoding="utf-8"))}
    assert sorted(written) == sorted(ops.OPERATORS)
    for name, text in written.items():
        assert torch._C.parse_schema(f"resnet_fused::{text}") == getattr(OPS, name).default._schema, name


@pytest.fixture(scope="module")
def bare_package(tmp_path_factory):
    """The package as RESNET_FUSED_NO_EXTENSIONS=1 installs it."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("needs the checkout")
    directory = tmp_path_factory.mktemp("bare")
    for path in (ROOT / "resnet_fused").rglob("*.py"):
        to = directory / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    _schemas().write(directory / "resnet_fused" / "ops" / "schemas.txt")
    return directory


def test_without_libraries_gpus_are_tritons_and_the_cpu_runs_the_reference(bare_package):
    program = """
import torch, resnet_fused
from resnet_fused import functional, ops
from resnet_fused.cli import doctor
assert resnet_fused.__file__.startswith(DIRECTORY), resnet_fused.__file__
x = torch.randn(2, 9, 5, 3, requires_grad=True)
ours = functional.batch_norm_add_relu(x, None, None, training=True)
assert torch.equal(ours, torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True)))
torch.ops.resnet_fused.batch_norm_add_relu_train(x, None, None, None, 1e-5, True, True)[0].sum().backward()
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert all(has("resnet_fused::" + name, "CUDA") == (torch.version.cuda is not None) for name in ops.OPERATORS)
print(*doctor.serves(torch.device("cpu")))
class Block(torch.nn.Module):
    pass
model = resnet_fused.BatchNormAddReLU2d(9)
print(resnet_fused.fusion_report(model).rows[0].reason)"""
    environment = {"PYTHONPATH": os.pathsep.join([str(bare_package), *sys.path]), "TRITON_INTERPRET": "0"}
    environment |= {"RESNET_FUSED_BACKEND": ""}
    program = program.replace("DIRECTORY", repr(str(bare_package)))
    status, printed = (
        _run(program, "-P", **environment) if sys.version_info >= (3, 11) else _run(program, **environment)
    )
    assert status == 0, printed
    for line in printed.splitlines():
        assert "RESNET_FUSED_NO_EXTENSIONS=1" in line
    assert printed.startswith("reference ")


def test_without_libraries_triton_serves_when_asked(bare_package):
    program = """
import torch
from resnet_fused import functional
from resnet_fused.cli import doctor
x = torch.randn(2, 9, 5, 3)
ours = functional.batch_norm_add_relu(x, None, None, training=True)
theirs = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
torch.testing.assert_close(ours, theirs)
print(*doctor.serves(torch.device("cpu")))"""
    environment = {"PYTHONPATH": os.pathsep.join([str(bare_package), *sys.path]), "TRITON_INTERPRET": "1"}
    status, printed = _run(program, RESNET_FUSED_BACKEND="triton", **environment)
    assert status == 0, printed
    assert re.match("triton all 17 operators have a Triton kernel for it", printed)


# Kernels compiled for GPUs that are not there.


@pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="needs the checkout")
@pytest.mark.parametrize("target", ["9.0", "gfx942"])
def test_machine_code_has_wide_accesses_and_no_spills(target):
    command = [sys.executable, str(ROOT / "tools" / "triton_checks.py"), "--shape", "8,256,14,14", "--target", target]
    command += ["--operator", "bn_add_relu", "--dtype", "bfloat16", "--layout", "NHWC"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {line["kernel"] for line in lines}
    assert {"batch_norm_statistics_kernel", "batch_norm_forward_kernel", "batch_norm_backward_kernel"} <= kernels
    assert all(line["registers"] <= 255 for line in lines)


@pytest.mark.parametrize("channels", [16, 5])
def test_offline_kernels_are_those_of_triton_s_launcher(channels, device):
    """Types, constants and what 16 divides, also where a batch, a number of chunks or of splits is 1."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from resnet_fused.triton import launchers, offline

    if triton_kernels.is_interpreted():
        pytest.skip("the interpreter compiles nothing")
    x, grad_output, found = *torch.randn(2, 1, channels, 4, 4).bfloat16(), []
    mean, var, affine = torch.zeros(channels), torch.ones(channels), torch.rand(2, channels).unbind()
    with offline.intercepted(found.append, H100):
        launchers.batch_norm_add_relu_train_with_update(x, *affine, x, mean, var, 0.1, 1e-5, True, True)
        *_, mask = launchers.dual_batch_norm_add_relu_train(x, *affine, x, *affine, 1e-5, 1e-5, True, True)
        statistics = affine[0], mean, var
        launchers.dual_batch_norm_add_relu_train_backward(
            grad_output, x, *statistics, x, *statistics, mask, True, *[True] * 6
        )
        launchers.batch_norm_statistics(x)
        launchers.add_relu_backward(grad_output, launchers.add_relu(x, x, True)[1])
    assert len({launch.name for launch in found}) >= 7
    backend = make_backend(offline.TARGETS["9.0"])
    for launch in found:
        bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
        values = [launch.arguments[name] for name in launch.kernel.arg_names]
        bound, specialization, options = bind(*values, num_warps=launch.warps)
        packed = launch.kernel._pack_args(backend, {"num_warps": launch.warps}, bound, specialization, options)
        source = launch.source()
        assert packed[1] == source.signature, launch.name
        assert packed[2] == source.constants, launch.name
        assert {at: sorted(what) for at, what in packed[3].items() if what} == source.attrs, launch.name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_offsets_are_of_64_bits(layout, device, monkeypatch):
    """Of every access to a tile of a tensor or of the mask."""
    from resnet_fused.triton import launchers, offline

    if triton_kernels.is_interpreted():
        pytest.skip("the interpreter compiles nothing")
    case = oracle.make_case((4, 64, 8, 8), torch.bfloat16, "cpu", layout=layout)
    a, found = case.branches[0], []
    with offline.intercepted(found.append, H100):
        _, mean, _, invstd, mask = launchers.batch_norm_add_relu_train(
            a.input, None, None, case.residual, 1e-5, True, True
        )
        launchers.batch_norm_add_relu_train_backward(
            case.grad_output, a.input, None, None, mean, invstd, mask, True, True, True, True, True
        )
        _, mask = launchers.add_relu(a.input, case.residual, True)
        launchers.add_relu_backward(case.grad_output, mask)
    seen = 0
    for launch in found:
        text = offline.compiled(launch, offline.TARGETS["8.0"]).asm["ttir"]
        # Tiles are blocks of two axes, or of many elements.
        for shape, pointee, offset in re.findall(
            r"tt\.addptr .* : tensor<([\dx]+)x!tt\.ptr<(\w+)>>, tensor<[\dx]+x(i\d+)>", text
        ):
            if pointee in ("bf16", "i8") and ("x" in shape or int(shape) > 512):
                assert offset == "i64", launch.name
                seen += 1
    assert seen >= 12


def test_a_plane_of_more_than_2_31_positions(device):
    """Its size reaches the kernels whole, as a number of 64 bits."""
    from torch._subclasses import FakeTensorMode

    from resnet_fused.triton import launchers, offline

    if triton_kernels.is_interpreted():
        pytest.skip("the interpreter compiles nothing")
    found = []
    with FakeTensorMode(), offline.intercepted(found.append, H100):
        x = torch.empty(1, 1, 1 << 16, 1 << 15, dtype=torch.bfloat16)
        launchers.batch_norm_add_relu_train(x, None, None, x, 1e-5, True, True)
    passes = [launch for launch in found if "position_units" in launch.arguments]
    assert len(passes) == 2
    for launch in passes:
        assert launch.arguments["position_units"] * launch.arguments["POSITION_UNIT"] == 1 << 31
        text = offline.compiled(launch, offline.TARGETS["8.0"]).asm["ttir"]
        assert "%position_units: i64" in text
        assert not re.search(r"arith\.muli %position_units.* : i32", text)


def test_a_spill_in_an_innermost_loop_is_told_from_one_around_it():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import triton_checks
    except ImportError:
        pytest.skip("needs the checkout")
    finally:
        sys.path.remove(str(ROOT / "tools"))
    sass = """
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   LDL R3, [R1] ;
        /*0030*/                   LDG.E.128 R4, [R2.64] ;
        /*0040*/                   LDL.LU R3, [R1] ;
        /*0050*/              @P0 BRA 0x30 ;
        /*0060*/                   STL [R1], R3 ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
        /*0080*/              @P2 BRA 0x20 ;
"""
    assert triton_checks.spills_in_loops(sass) == 1
    kernel = triton_checks.Compiled(
        "bn", "forward", "k", "bfloat16", "NHWC", (8, 64, 7, 7), "9.0", 4, 40, 4, 1, 0, 16, 16
    )
    assert ["innermost loops" in fault for fault in kernel.faults()] == [True]
    narrow = dataclasses.replace(kernel, spills=2, spills_in_loops=0, load=4, store=2)
    assert len(narrow.faults()) == 2
