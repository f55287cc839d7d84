"""What a call asks of the device besides its kernels' work: launches, memsets, allocations, and blocks that fill it."""

import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLAN = ROOT / "csrc" / "cuda" / "plan.h"
if not PLAN.is_file():
    pytest.skip("needs the checkout: csrc/cuda/plan.h", allow_module_level=True)

emulated = pytest.mark.skipif(
    "config.getoption('--backend') != 'emulated'", reason="calls are recorded under the emulator: `make test-emulated`"
)

# The inputs of a BatchNorm of ResNet-50: channels and width.
RESNET50 = ((64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28), (256, 14), (512, 14),
            (1024, 14), (512, 7), (2048, 7))  # fmt: skip

# Runs under the recorder (tests/recorder.c): step() gives what forward and backward of a training step ask for.
SCRIPT = """
import ctypes, json
import torch
from torch.profiler import ProfilerActivity, profile
from resnet_fused.functional import batch_norm_add_relu, dual_batch_norm_add_relu

recorder = ctypes.CDLL({recorder!r})
text = ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(recorder, "recorder_text")))

def recorded(call):
    recorder.recorder_reset()
    with profile(activities=[ProfilerActivity.CPU]) as of_torch:
        result = call()
    copies = [e.name for e in of_torch.events() if e.name in ("aten::clone", "aten::copy_", "aten::contiguous")]
    return result, ctypes.string_at(text).decode().splitlines() + ["copy " + name for name in copies]

def step(form, shape, dtype, layout, make):
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, other = (make(shape, dtype=dtype).contiguous(memory_format=format).requires_grad_() for _ in range(2))
    weight, bias, weight2, bias2 = (make(shape[1]).requires_grad_() for _ in range(4))
    running = [make(shape[1]) for _ in range(4)]
    relu = form.endswith("relu")
    if form.startswith("dual"):
        inputs = [x, weight, bias, other, weight2, bias2]
        forward = lambda: dual_batch_norm_add_relu(
            x, *running[:2], weight, bias, other, *running[2:], weight2, bias2, training=True, relu=relu)
    else:
        residual = other if "add" in form else None
        inputs = [x, weight, bias] + ([] if residual is None else [residual])
        forward = lambda: batch_norm_add_relu(x, *running[:2], weight, bias, residual, training=True, relu=relu)
    output, lines = recorded(forward)
    grad = make(shape, dtype=dtype).contiguous(memory_format=format)
    _, of_backward = recorded(lambda: torch.autograd.grad(output, inputs, grad))
    return {{"forward": lines, "backward": of_backward}}
"""
FORMS = ("bn", "bn_relu", "bn_add", "bn_add_relu", "dual", "dual_relu")


def _run(tmp_path, program: str, **environment) -> dict:
    """What the program prints, in a process of its own under the recorder."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, which builds tests/recorder.c")
    recorder = tmp_path / "recorder.so"
    source = pathlib.Path(__file__).with_name("recorder.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", recorder, "-ldl"], check=True)
    script = SCRIPT.format(recorder=str(recorder)) + program
    environment = os.environ | environment | {"LD_PRELOAD": f"{recorder}:{os.environ['LD_PRELOAD']}"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _count(lines, kind) -> int:
    return sum(line.split()[0] == kind for line in lines)


# Tensors that a training step allocates: output, mean, invstd, the table between the passes, and the mask or a copy of
# the bias; gradients of input, residual, weight and bias, and the table.
ALLOCATIONS = {
    "bn": (5, 4),
    "bn_relu": (5, 4),
    "bn_add": (5, 4),
    "bn_add_relu": (5, 5),
    "dual": (7, 7),
    "dual_relu": (8, 7),
}


@emulated
@pytest.mark.parametrize("on_chip", ["0", "1"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_calls_of_a_training_step(layout, on_chip, tmp_path):
    program = f"""
arguments = (4, 64, 16, 16), torch.bfloat16, {layout!r}, torch.ones
print(json.dumps({{form: (step(form, *arguments), step(form, *arguments))[1] for form in {FORMS}}}))
"""
    for form, parts in _run(tmp_path, program, RESNET_FUSED_ON_CHIP=on_chip).items():
        launches = 1 if on_chip == "1" and not form.startswith("dual") else 2
        for direction, allocations in zip(("forward", "backward"), ALLOCATIONS[form], strict=True):
            lines = parts[direction]
            what = (form, direction, lines)
            assert _count(lines, "launch") == launches, what
            assert _count(lines, "memset") == _count(lines, "copy") == _count(lines, "call") == 0, what
            assert _count(lines, "allocate") == allocations, what
            # The current device, errors, which a cooperative launch returns itself, and where blocks share a channel
            # whether the stream is captured.
            assert _count(lines, "ask") <= {1: 6, 2: 7}[launches], what


@emulated
def test_a_captured_launch_has_memory_of_its_own(tmp_path):
    """Which it clears: a graph runs on any stream."""
    program = """
x, other = torch.randn(2, 16, 8, 32, 32)
results = []
for captures in (0, 1):
    ctypes.c_int.in_dll(recorder, "recorder_captures").value = captures
    ones, zeros = torch.ones(8), torch.zeros(8)
    call = lambda: batch_norm_add_relu(x, zeros, ones, None, None, other, training=True)
    recorded(call)
    results.append(recorded(call))
print(json.dumps([torch.equal(results[0][0], results[1][0]), *(lines for _, lines in results)]))
"""
    same, kept, captured = _run(tmp_path, program, RESNET_FUSED_ON_CHIP="0")
    assert same
    assert _count(captured, "memset") == _count(kept, "memset") + 1 == 1
    assert _count(captured, "allocate") == _count(kept, "allocate") + 1


@emulated
@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernels_of_resnet50_fill_an_h100(layout, batch, tmp_path):
    """With 64 registers a thread. No kernel runs, and no memory is touched."""
    program = f"""
ctypes.c_int.in_dll(recorder, "recorder_dry").value = 1

def uninitialized(shape, dtype=torch.float32):
    vector = isinstance(shape, int) or {layout!r} == "contiguous"
    return torch.empty(shape, dtype=dtype, memory_format=torch.contiguous_format if vector else torch.channels_last)

result = {{}}
for channels, width in {RESNET50}:
    for form in ("bn_relu", "bn_add_relu", "dual_relu"):
        for dtype in (torch.bfloat16, torch.float32):
            shape = ({batch}, channels, width, width)
            parts = step(form, shape, dtype, {layout!r}, uninitialized)
            result[f"{{form}} {{dtype}} {{shape}}"] = parts["forward"] + parts["backward"]
print(json.dumps(result))
"""
    environment = {
        "RESNET_FUSED_ON_CHIP": "0",
        "CUDA_ON_CPU_DEVICE": "h100",
        "CUDA_ON_CPU_REGISTERS": "64",
        "CUDA_ON_CPU_POISON": "0",
    }
    most = 132 * 4  # 65536 registers to a multiprocessor
    for what, lines in _run(tmp_path, program, **environment).items():
        launches = [tuple(map(int, line.split()[1:4])) for line in lines if line.startswith("launch")]
        assert len(launches) == 4, what
        shape = tuple(map(int, what[what.index("(") + 1 : -1].split(",")))
        values = shape[0] * shape[1] * shape[2] * shape[3]
        for x, y, threads in launches:
            # The most that a thread has under way at once: four accesses of 16 bytes.
            work = values * y // (threads * 4 * (8 if "bfloat16" in what else 4))
            assert x * y >= 0.9 * min(most, work), (what, launches)


@pytest.fixture(scope="module")
def sums_plan(tmp_path_factory):
    """``plan_sums`` of csrc/cuda/plan.h, compiled: groups, chunks of each and the blocks that share them."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler, which builds csrc/cuda/plan.h for this test")
    library = tmp_path_factory.mktemp("plan") / "plan.so"
    source = """
#include "cuda/plan.h"
extern "C" void sums_plan(int64_t n, int64_t c, int64_t positions, int rows, int v, int unroll, int branches,
                          int64_t resident, int64_t* result) {
  using namespace resnet_fused::cuda;
  const SumsPlan plan = plan_sums({n, c, positions, rows != 0}, 2, v, unroll, branches, false,
                                  [&](int, int64_t) { return resident; });
  result[0] = (rows ? plan.walk.tiles : c) * branches, result[1] = plan.walk.chunks, result[2] = plan.walk.splits;
}
"""
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", "-x", "c++", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True)
    function = ctypes.CDLL(str(library)).sums_plan
    function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 4 + [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]

    def plan(*arguments):
        result = (ctypes.c_int64 * 3)()
        function(*arguments, result)
        return tuple(result)

    return plan


# Multiprocessors, and how many blocks of a kernel each may hold.
DEVICES = {
    "H100": (132, range(3, 9)),
    "A100": (108, range(3, 9)),
    "L4": (58, range(1, 7)),
    "RTX 4090": (128, range(1, 7)),
}


@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("device_name", DEVICES)
def test_rounds_of_the_reductions(device_name, rows, sums_plan):
    """What a channel's blocks take, in chunks of work, beside the mean over all that the device holds at once."""
    processors, of_each = DEVICES[device_name]
    for per_processor in of_each:
        resident = processors * per_processor
        for channels, width in RESNET50:
            positions = width * width
            v = 8 if rows or positions % 8 == 0 else 4 if positions % 4 == 0 else 1  # 16-bit values of an access
            for batch in (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256):
                for unroll in (1, 2, 4, 8):
                    for branches in (1, 2):
                        case = (batch, channels, positions, rows, v, unroll, branches, resident)
                        groups, chunks, splits = sums_plan(*case)
                        assert 1 <= splits <= chunks, case
                        time = -(-groups * splits // resident) * -(-chunks // splits)
                        assert time <= 1.4 * groups * chunks / resident + 1, (case, groups, chunks, splits)
                        # What 64 registers a thread leave room for, and, of kernels of rows, 80.
                        if device_name == "H100" and (per_processor == 4 or (rows and per_processor == 3)):
                            assert groups * splits >= 0.9 * resident or splits == chunks, (
                                case,
                                groups,
                                chunks,
                                splits,
                            )
