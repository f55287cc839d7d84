"""Profiles of the benchmarks, and a table of time and bytes at their end."""

import statistics

import pytest
import torch
from tabulate import tabulate

from resnet_fused.doctor import serves
from resnet_fused.measure import cpu_name


def pytest_addoption(parser):
    """Adds ``--full``."""
    parser.addoption("--full", action="store_true", help="all shapes, batch sizes, layouts and dtypes, many rounds")


@pytest.fixture
def run(benchmark, request):
    """Times a function; notes the bytes that a call moves beside the time."""
    rounds = 20 if request.config.getoption("full") else 5

    def timed(function, group: str, bytes_per_call: int | None = None) -> None:
        benchmark.group = group
        benchmark.extra_info["bytes per call"] = bytes_per_call
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.pedantic(function, rounds=rounds, warmup_rounds=2)

    return timed


def pytest_sessionstart():
    """Ends the session where fused kernels do not run, for then their times would be those of something else."""
    served_by, reason = serves(torch.device("cpu"))
    if served_by != "compiled":
        pytest.exit(f"there is nothing fused to time: {reason}", returncode=1)


def pytest_report_header():
    """The machine."""
    return f"benchmarks on {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter, config):
    """Prints times, bytes per call and the bandwidth that follows from both."""
    session = getattr(config, "_benchmarksession", None)
    rows = []
    for result in getattr(session, "benchmarks", []):
        if result.has_error or not result.stats.rounds:
            continue
        median = statistics.median(result.stats.data)
        size = result.extra_info.get("bytes per call")
        rows.append(
            (
                result.group,
                result.params["variant"],
                1e3 * median,
                size / 1e6 if size else None,
                size / median / 1e9 if size else None,
            )
        )
    if rows:
        headers = ("benchmark", "variant", "median, ms", "MB per call", "GB/s")
        terminalreporter.section("time and bytes per call (passes counted by hand, nothing in cache)")
        terminalreporter.write_line(tabulate(rows, headers=headers, tablefmt="simple", floatfmt=".2f"))
        terminalreporter.write_line("Times of a noisy machine; for ratios see python -m benchmarks.compare.")
