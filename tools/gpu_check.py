"""On a machine with a GPU: tests, sanitizer and benchmarks of the CUDA library there, and one report of it all.

    make gpu-check          python tools/gpu_check.py [--report build/gpu-check.md] [--full]

Returns 1 where there is no GPU, where the compiled kernels do not serve it, or where something fails.
"""

import argparse
import datetime
import json
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What each tool of compute-sanitizer watches; a sample of the tests, for it makes them a hundred times slower.
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = ("tests/test_forward.py", "tests/test_backward.py", "--sample", "1/40")


class Report:
    """The file, and whether all went well."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.parts: list[str] = []
        self.failed = False

    def add(self, heading: str, text: str, failed: bool = False) -> None:
        """Adds a part, and writes what there is so far."""
        self.failed |= failed
        self.parts.append(f"## {heading}{': FAILED' if failed else ''}\n\n{text.rstrip()}\n")
        title = f"# CUDA kernels on a GPU, {datetime.date.today()}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join([title, *self.parts]), encoding="utf-8")
        print(f"{heading}: {'failed' if failed else 'done'}", flush=True)


def run(*command: str) -> tuple[int, str]:
    """Exit code and output of a command in the checkout."""
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    return done.returncode, done.stdout


def block(text: str, lines: int = 60) -> str:
    """The end of a command's output, as it was."""
    return "```\n" + "\n".join(text.rstrip().splitlines()[-lines:]) + "\n```"


def machine() -> str:
    """Versions and the GPU, as a list."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    _, driver = run("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader")
    entries = {
        "GPU": f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.1f} GiB",
        "driver, SM clock, memory clock": driver.strip().splitlines()[0] if driver.strip() else "unknown",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "Python": platform.python_version(),
        "system": platform.platform(),
        "commit": run("git", "describe", "--always", "--dirty")[1].strip(),
    }
    return "\n".join(f"- {name}: {value}" for name, value in entries.items())


def tests(report: Report) -> None:
    """The whole suite on CUDA tensors."""
    code, output = run(sys.executable, "-m", "pytest", "-q", "--backend", "cuda", "tests")
    report.add("Tests on CUDA tensors", block(output), code != 0)


def sanitizer(report: Report) -> None:
    """A sample of the suite under each tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        report.add("compute-sanitizer", "Not installed: left out.")
        return
    lines, failed = [], False
    for tool in SANITIZERS:
        command = [program, f"--tool={tool}", "--error-exitcode=9", "--target-processes=all"]
        # torch's allocator keeps freed memory, and the sanitizer cannot tell its blocks apart.
        command += ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        code, output = run(*command, sys.executable, "-m", "pytest", "-q", "--backend", "cuda", *SANITIZED)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        lines.append(f"- {tool}: {summary[-1] if summary else 'no summary'}")
        if code:
            failed = True
            lines.append(block(output))
    report.add("compute-sanitizer", "\n".join(lines), failed)


def benchmarks(report: Report, full: bool) -> None:
    """Fused beside eager, torch.compile and apex, by the GPU's clock, with cold L2."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import device

    device.choose("cuda")
    copy = device.copy_bandwidth()
    results = report.path.with_suffix(".json")
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--device", "cuda", f"--benchmark-json={results}"]
    code, output = run(*command, *(["--full"] if full else []))
    text = f"A copy of 1 GiB moves {copy / 1e9:.0f} GB/s, reads and writes together.\n\n"
    if results.is_file():
        text += table(json.loads(results.read_text(encoding="utf-8")), copy)
    report.add("Benchmarks", text + ("\n\n" + block(output) if code else ""), code != 0)


def table(results: dict, copy: float) -> str:
    """Medians of pytest-benchmark's results, as Markdown."""
    lines = ["| benchmark | variant | median, ms | GB/s | of a copy |", "|---|---|---|---|---|"]
    for result in results["benchmarks"]:
        extra = result["extra_info"]
        times = extra.get("GPU seconds")
        if not times:
            continue
        median = statistics.median(times)
        size = extra.get("bytes per call")
        rate = (f"{size / median / 1e9:.0f}", f"{size / median / copy:.2f}") if size else ("", "")
        cells = (result["group"], result["params"]["variant"], f"{1e3 * median:.4f}", *rate)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Returns 1 where something is missing or fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", type=pathlib.Path, default=ROOT / "build" / "gpu-check.md")
    parser.add_argument("--full", action="store_true", help="the benchmarks' full profile")
    options = parser.parse_args()
    import torch

    sys.path.insert(0, str(ROOT))
    if not torch.cuda.is_available():
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        print(f"gpu-check: nothing to check here: {reason}", file=sys.stderr)
        return 1
    from resnet_fused.doctor import serves

    served_by, reason = serves(torch.device("cuda", 0))
    report = Report(options.report)
    report.add("Machine", machine() + f"\n- served by: {served_by}, {reason}", served_by != "compiled")
    if served_by == "compiled":
        tests(report)
        sanitizer(report)
        benchmarks(report, options.full)
    print(f"gpu-check: the report is {report.path}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
