"""The check for machines with a GPU, as far as it can be had without one: its steps, their limits, what is told."""

import importlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
if not TOOLS.is_dir():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path[:0] = [str(ROOT), str(TOOLS)]
gpu_check = importlib.import_module("gpu_check")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch finds no GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_plan_is_of_steps_that_there_are_and_fits_in_seven_minutes():
    for step in gpu_check.PLAN:
        assert (TOOLS / "gpu" / f"{step.name}.py").is_file()
    groups = gpu_check.rounds(gpu_check.PLAN)
    assert sum(max(step.seconds for step in group) for group in groups) <= 7 * 60
    assert [[step.name for step in group] for group in groups if len(group) > 1] == [
        ["values", "streams", "suite", "sanitizer", "prepare"]
    ], "nothing that is timed has company"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--only", "value"], "no such step: value"), (["--variants", "nowhere.so"], "nowhere.so is no file")],
)
def test_what_cannot_be_done_is_refused_before_anything_is(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        gpu_check.parse(arguments)
    assert sentence in capsys.readouterr().err


# What steps do in place of a check.
STEPS = {
    "good": "print('noise'); print('--- in short'); print('a table')",
    "bad": "print('WRONG: the operator'); sys.exit(3)",
    "absent": "print('skipped: no program'); sys.exit(77)",
    "reader": "print('bad is told' if 'WRONG: the operator' in open('OUT/report.md').read() else 'nothing is told')",
    "hung": "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()",
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs steps of these names; returns the status, the report and what was on the screen."""

    def run(*names, minutes=7.0, together=(), seconds=30):
        plan = tuple(gpu_check.Planned(name, seconds, "", name in together) for name in names)
        monkeypatch.setattr(gpu_check, "PLAN", plan)

        def command(name, seconds, options):
            code = STEPS[name].replace("OUT", str(options.out))
            return [sys.executable, "-S", "-u", "-c", f"import subprocess, sys, time; {code}"]

        monkeypatch.setattr(gpu_check, "command", command)
        options = gpu_check.parse(["--out", str(tmp_path), "--minutes", str(minutes)])
        code = gpu_check.check(options, "A check")
        return code, (tmp_path / "report.md").read_text(), capsys.readouterr().out

    return run


def test_where_all_is_well_the_status_is_0(run):
    code, report, screen = run("good", "absent")
    assert code == 0
    assert "## good: ok in " in report
    assert "noise" in report
    assert "## absent: skipped in " in report
    assert "==== good\na table\n" in screen
    assert "noise" not in screen
    assert "skipped: no program" in screen


@pytest.mark.parametrize("together", [(), ("bad", "good")])
def test_a_step_that_fails_leaves_the_others_alone_and_is_told(run, together):
    code, report, screen = run("bad", "good", "reader", together=together)
    assert code == 1
    assert "## bad: FAILED: status 3" in report
    assert "WRONG: the operator" in screen
    assert "## good: ok" in report
    assert "bad is told" in report, "the report is written as it goes"
    assert screen.splitlines()[-4].startswith("bad ")


def test_a_step_ends_at_its_limit_with_all_that_it_started(run, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    code, report, _ = run("hung", "good", seconds=1)
    assert code == 1
    assert "## hung: FAILED: killed after " in report
    assert "## good: ok" in report
    child = int(report.split("```")[1])
    for _ in range(50):
        if _is_gone(child):
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("what the step started has outlived it")


def _is_gone(pid: int) -> bool:
    state = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_step_for_which_there_is_no_time_was_not_proven(run):
    code, report, _ = run("good", minutes=0.1)
    assert code == 1
    assert "## good: not begun: no time was left" in report


def test_the_closing_tables_are_short_and_keep_what_is_last(tmp_path):
    steps = []
    for number, size in enumerate((10, 20_000, 60_000, 300)):
        log = tmp_path / str(number)
        log.write_text("--- in short\n" + "x" * 40 + "\n" + ("y" * 79 + "\n") * (size // 80) + f"the end of {number}")
        steps.append(gpu_check.Running(gpu_check.Planned(str(number), 1, ""), log, "ok", False))
        steps[-1].process = object()
    text = gpu_check.closing(steps)
    assert 10_000 < len(text) <= 12_000
    for number in range(4):
        assert f"the end of {number}" in text
    assert text.count("(more in the report)") == 2


# The steps themselves.


@pytest.fixture
def step(request, tmp_path):
    """A step that is rehearsed, for one dtype."""
    if request.config.getoption("--backend") != "compiled":
        pytest.skip("about the checks, on the CPU's library")
    from gpu.step import Step

    return Step("values", True, time.monotonic() + 300, tmp_path / "numbers.csv", "compiled:float32", [])


@pytest.fixture
def plant():
    """Puts a kernel in place of a CPU kernel, until the test ends."""
    planted = torch.library.Library("resnet_fused", "IMPL")

    def put(name, change):
        from resnet_fused.ops import reference

        def kernel(*arguments):
            return change(getattr(reference, name)(*arguments))

        planted.impl(name, kernel, "CPU", allow_override=True)

    yield put
    planted._destroy()


def test_right_kernels_pass_and_their_errors_are_kept(step, capsys):
    from gpu import values

    assert values.part(step) == 0
    assert "0 wrong" in capsys.readouterr().out
    lines = step.numbers.read_text().splitlines()
    assert "values,bn_add_relu float32 NHWC 2x65x7x7 train,compiled,error of grad_weight / allowed," in "\n".join(lines)


def _first(change):
    return lambda results: (change(results[0].clone()), *results[1:])


def _one_element(output):
    output[-1, 0, 0, 0] += 1e-3
    return output


def _raises(results):
    raise RuntimeError("no such launch")


def _not_written(output):
    output[-1, -1, -1, -1] = float("nan")
    return output


@pytest.mark.parametrize(
    ("operator", "change", "told"),
    [
        ("batch_norm_add_relu_train_with_update", _first(lambda y: y * 1.0001), "train [compiled] output: error"),
        ("batch_norm_add_relu_eval", _first(_one_element), "eval [compiled] output: error"),
        ("dual_batch_norm_add_relu_train_backward", _first(_not_written), "train [compiled] grad_input: error inf"),
        ("add_relu_backward", lambda grad: grad * 1.001, "[compiled] grad_"),
        ("batch_norm_add_relu_eval", _raises, "eval [compiled] RuntimeError: no such launch"),
    ],
)
def test_a_planted_wrong_kernel_is_found_and_named(step, plant, capsys, operator, change, told):
    from gpu import values

    plant(operator, change)
    assert values.part(step) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG: ")]
    assert wrong
    form = "dual_relu" if "dual" in operator else "add_relu" if operator.startswith("add_relu") else "bn"
    for line in wrong:
        assert line.startswith(f"WRONG: {form}")
        assert told in line
        assert " float32 N" in line


def test_a_kernel_that_gives_other_bits_each_time_is_found(step, plant, capsys):
    from gpu import values

    calls = []

    def change(results):
        calls.append(0)
        # The least there is, so that the error stays within what is allowed.
        return (torch.nextafter(results[0], results[0] + len(calls) % 2), *results[1:])

    plant("batch_norm_add_relu_eval", change)
    assert values.part(step) == 1
    assert "output: other bits the second time" in capsys.readouterr().out


def test_counters_are_read_in_one_unit():
    from gpu import counters

    header = '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__grid_size"'
    kernel = '"void resnet_fused::cuda::(anonymous namespace)::batch_norm_forward_kernel<float>(int)"'
    text = "\n".join(["==PROF== noise", header, '"","","ns","Gbyte",""', f'"0",{kernel},"12,500","1.5","1,056"'])
    (row,) = counters.parse(text)
    assert row["kernel"].startswith("batch_norm_forward_kernel<float>")
    assert (row["us"], row["MB read"], row["blocks"], row["registers"]) == ("12.5", "1500", "1056", "")
    assert counters.parse("no counters") == []


@pytest.mark.parametrize(
    ("status", "output", "line", "is_bad"),
    [
        (0, "calls done\n========= ERROR SUMMARY: 0 errors", "ERROR SUMMARY: 0 errors", False),
        (9, "calls done\n========= ERROR SUMMARY: 2 errors", "FAILED: status 9: ERROR SUMMARY: 2 errors", True),
        (1, "========= ERROR SUMMARY: 0 errors", "FAILED: status 1: ERROR SUMMARY: 0 errors", True),
        (1, "Error: Device not supported", "could not watch: Error: Device not supported", False),
        (None, "", "not done in its time", False),
    ],
)
def test_what_the_sanitizer_says(status, output, line, is_bad):
    from gpu import sanitizer

    assert sanitizer.verdict(status, output) == (line, is_bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_residual", [False, True])
def test_the_graphs_of_cudnn_are_valid(dtype, has_residual):
    """As far as cuDNN says without a GPU."""
    cudnn = pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend", exc_type=ImportError)
    from benchmarks import cudnn_operator

    x = torch.empty(32, 256, 56, 56, device="meta", dtype=dtype).to(memory_format=torch.channels_last)
    vector, number = torch.empty(1, 256, 1, 1, device="meta"), torch.full((1, 1, 1, 1), 1e-5)
    made = [
        cudnn_operator.forward_graph(x, x if has_residual else None, vector, number, None),
        cudnn_operator.backward_graph(x, has_residual, vector, None),
    ]
    try:
        for graph in made:
            graph.graph.validate()
    except Exception as error:
        if "driver" not in str(error):
            raise
        pytest.skip(f"cudnn {cudnn.__version__} needs NVIDIA's driver")
    forward, backward = (graph.tensors for graph in made)
    for tensors, name in ((forward, "output"), (forward, "mask"), (backward, "grad_x")):
        assert tensors[name].get_dim() == list(x.shape)
        assert tensors[name].get_stride() == list(x.stride())
    assert backward["grad_weight"].get_dim() == [1, 256, 1, 1]
    assert ("grad_residual" in backward) == ("residual" in forward) == has_residual
