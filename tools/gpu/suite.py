"""The project's tests of operators, modules and recomputation, with ``--backend cuda``, in parallel.

In parts, so that what ran before the time was up has been told. Tensors beyond 2^31 elements are a process's own.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys

from .step import ROOT, SHORT, Step, begin, skip

FILES = ("cuda", "forward", "backward", "determinism", "layout", "adversarial", "modules", "gradcheck")
FILES += ("handover", "recompute", "errors", "functorch", "opcheck", "second_gradient", "backend", "torch_samples")
PARTS = 4
LARGE = "test_more_than_two_to_the_31_elements"


def command(step: Step, part: str, sample: str) -> list[str]:
    """A part of the tests, or the large tensors."""
    backend, workers = ("compiled", 2) if step.rehearse else ("cuda", 10)
    common = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-r", "fE", "-p", "no:cacheprovider"]
    common += ["--backend", backend, "--rootdir", str(ROOT), "--maxfail", "20"]
    if part == "large":
        return [*common, "-k", LARGE, "tests/test_cuda.py"]
    xdist = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    names = FILES[:2] if step.rehearse else FILES
    files = [f"tests/test_{name}.py" for name in names if (ROOT / "tests" / f"test_{name}.py").is_file()]
    return [*common, *xdist, "--sample", sample, "-k", f"not {LARGE}", *files]


def run(step: Step, part: str, sample: str = "1/1") -> tuple[int | None, str]:
    """Status and last line; a part that is out of time is interrupted, so that pytest tells of its failures."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command(step, part, sample), cwd=ROOT, env=environment, **pipes)
    out_of_time = False
    try:
        output, _ = process.communicate(timeout=max(step.left(), 5))
    except subprocess.TimeoutExpired:
        out_of_time = True
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    lines = output.strip().splitlines() or [""]
    print(f"{part} {sample}:\n" + "\n".join(lines[-60:]), flush=True)
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    for line in failed:
        step.record(line[:200], part, "test", "failed")
    step.record(f"{part} {sample}", "pytest", "result", lines[-1])
    last = f"{'out of time: ' if out_of_time else ''}{lines[-1]}"
    return (int(bool(failed)) if out_of_time else process.returncode), "\n".join([*failed[:10], last])


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a test fails, or where none was run."""
    step = begin("suite", arguments, needs=["numpy", "pytest"])
    from resnet_fused.ops import backend

    reason = backend.why_not_compiled(step.device)
    if reason is not None:
        skip(reason)
    samples = ["1/97"] if step.rehearse else [f"{number}/{PARTS}" for number in range(PARTS)]
    results = {}
    for sample in samples:
        if step.left() > 10:
            results[f"tests, part {sample}"] = run(step, "tests", sample)
    if step.left() > 10:
        results["tensors beyond 2^31"] = run(step, "large")
    print(SHORT)
    for name, (status, line) in results.items():
        print(f"{name}: {'' if status == 0 else f'FAILED ({status}): '}{line}")
    print(f"{len(results)} of {len(samples) + 1} parts were begun")
    passed = sum(int(count) for _, line in results.values() for count in re.findall(r"(\d+) passed", line))
    return int(not passed or any(status for status, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
