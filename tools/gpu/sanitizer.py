"""compute-sanitizer over a few calls of every operator: memory, races, barriers; of our kernels alone."""

import os
import re
import subprocess
import sys

from .step import SHORT, Step, begin, program, skip

TOOLS = ("memcheck", "racecheck", "synccheck")
KERNELS = "batch_norm|add_relu|running"
# What a tool reports an error with; a status of the calls themselves is another.
FOUND = 9
MODES = {"on chip": "1", "streaming": "0"}


def command(sanitizer: str, tool: str, filtered: bool) -> list[str]:
    """The calls under a tool."""
    only = ["--kernel-regex", f"kns={KERNELS}"] if filtered else []
    options = [f"--tool={tool}", f"--error-exitcode={FOUND}", "--report-api-errors=no", *only]
    return [sanitizer, *options, sys.executable, "-m", "gpu.calls", "cuda", "small"]


def watch(sanitizer: str, step: Step, filtered: bool) -> dict[tuple[str, str], tuple[int | None, str]]:
    """Status and output of every tool in both modes, side by side."""
    started = {}
    for mode, on_chip in MODES.items():
        # torch's allocator keeps freed memory, and the sanitizer cannot tell its blocks apart.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "RESNET_FUSED_ON_CHIP": on_chip}
        for tool in TOOLS:
            started[tool, mode] = subprocess.Popen(
                command(sanitizer, tool, filtered),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
    found: dict[tuple[str, str], tuple[int | None, str]] = {}
    for key, process in started.items():
        try:
            output, _ = process.communicate(timeout=max(step.left(), 1))
            found[key] = process.returncode, output
        except subprocess.TimeoutExpired:
            process.kill()
            found[key] = None, process.communicate()[0]
    return found


def verdict(status: int | None, output: str) -> tuple[str, bool]:
    """What a tool says in a line, and whether that is bad."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    if status is None:
        return "not done in its time", False
    if not summary:
        return f"could not watch: {' '.join(output.split())[-200:]}", False
    if status == 0 and "calls done" in output:
        return summary[-1], False
    return f"FAILED: status {status}: {summary[-1]}", True


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a tool finds something, or where the calls fail under it."""
    step = begin("sanitizer", arguments, needs=["numpy"])
    if step.rehearse:
        print("needs a GPU; the calls alone:", flush=True)
        return subprocess.run([sys.executable, "-m", "gpu.calls", "cpu", "small"], check=False).returncode
    sanitizer = program("compute-sanitizer", "usr/local/cuda*/bin/compute-sanitizer")
    if sanitizer is None:
        skip("there is no compute-sanitizer")
    found = watch(sanitizer, step, filtered=True)
    if all("SUMMARY" not in output for _, output in found.values()) and step.left() > 20:
        print("no summary with the filter of kernels; without it:")
        print("\n".join(next(iter(found.values()))[1].splitlines()[-5:]), flush=True)
        found = watch(sanitizer, step, filtered=False)
    lines, bad = [], False
    for (tool, mode), (status, output) in found.items():
        line, is_bad = verdict(status, output)
        bad |= is_bad
        lines.append(f"{tool}, {mode}: {line}")
        step.record("calls", mode, tool, line)
        if is_bad:
            print("\n".join(output.splitlines()[:60]), flush=True)
    print(SHORT)
    print("\n".join(lines))
    if all(": could not watch: " in line for line in lines):
        skip("compute-sanitizer cannot watch here")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
