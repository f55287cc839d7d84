"""Profiles of the benchmarks, and a table of time and bytes at their end."""

import statistics

import pytest
import torch
from tabulate import tabulate

from resnet_fused.cli.doctor import serves

from . import device


def pytest_addoption(parser):
    """Adds ``--full`` and ``--device``."""
    parser.addoption("--full", action="store_true", help="all shapes, batch sizes, layouts and dtypes, many rounds")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="what is measured (default: %(default)s)")


def pytest_configure(config):
    """Chooses the device before any tensor is made."""
    device.choose(config.getoption("device"))


@pytest.fixture
def run(benchmark, request):
    """Times a function; notes the bytes that a call moves beside the time."""
    rounds = 20 if request.config.getoption("full") else 5

    def timed(function, group: str, bytes_per_call: int | None = None) -> None:
        benchmark.group = group
        benchmark.extra_info["bytes per call"] = bytes_per_call
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.extra_info["device"] = device.name()
        if device.chosen().type == "cpu":
            benchmark.pedantic(function, rounds=rounds, warmup_rounds=2)
            return
        # pytest-benchmark's clock is the host's; the GPU's own is kept beside it.
        times: list[float] = []
        benchmark.pedantic(lambda: times.append(device.gpu_seconds(function)), rounds=rounds, warmup_rounds=2)
        benchmark.extra_info["GPU seconds"] = times[2:]

    return timed


def pytest_sessionstart():
    """Ends the session where fused kernels do not run, for then their times would be those of something else."""
    served_by, reason = serves(device.chosen())
    if served_by == "reference":
        pytest.exit(f"there is nothing fused to time: {reason}", returncode=1)


def pytest_report_header():
    """The machine."""
    return f"benchmarks on {device.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter, config):
    """Prints times, bytes per call and the bandwidth that follows from both."""
    session = getattr(config, "_benchmarksession", None)
    rows = []
    copy = device.copy_bandwidth() if device.chosen().type == "cuda" else None
    for result in getattr(session, "benchmarks", []):
        if result.has_error or not result.stats.rounds:
            continue
        median = statistics.median(result.extra_info.get("GPU seconds", result.stats.data))
        size = result.extra_info.get("bytes per call")
        rows.append(
            (
                result.group,
                result.params["variant"],
                1e3 * median,
                size / 1e6 if size else None,
                size / median / 1e9 if size else None,
                size / median / copy if size and copy else None,
            )
        )
    if rows:
        headers = ("benchmark", "variant", "median, ms", "MB per call", "GB/s", "of a copy")
        terminalreporter.section("time and bytes per call (passes counted by hand, nothing in cache)")
        terminalreporter.write_line(tabulate(rows, headers=headers, tablefmt="simple", floatfmt=".2f"))
        terminalreporter.write_line("Times of a noisy machine; for ratios see python -m benchmarks.compare.")
