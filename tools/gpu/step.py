"""What every step of the check is given: its arguments, its device, its time, and where numbers go."""

import argparse
import csv
import dataclasses
import importlib.util
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# The exit status of a step that found nothing to do here, and has said why.
SKIPPED = 77
# What stands behind the last line of this in a step's output is its short table.
SHORT = "--- in short"
T = TypeVar("T")


@dataclasses.dataclass
class Step:
    """One step, as it was called.

    Attributes:
        name: of the step, in the first column of the numbers.
        rehearse: tiny sizes, on the CPU.
        end: when it should be done, by ``time.monotonic()``; it is killed somewhat later.
        numbers: the CSV file that every step appends to.
        part: of the step's work, where it is divided among processes.
        variants: further builds of the CUDA library to time.
    """

    name: str
    rehearse: bool
    end: float
    numbers: pathlib.Path | None
    part: str | None
    variants: list[str]

    @property
    def device(self) -> torch.device:
        """Whose tensors are used."""
        return torch.device("cpu" if self.rehearse else "cuda")

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @property
    def compiler(self) -> str:
        """The backend of torch.compile: where it is but rehearsed, one that generates no code."""
        return "aot_eager" if self.rehearse else "inductor"

    def arguments(self, part: str, share: float = 1) -> list[str]:
        """Of a process that does a part of this step, in a share of the time that is left."""
        given = ["--seconds", f"{share * self.left():.0f}", "--part", part]
        given += ["--rehearse"] if self.rehearse else []
        return given + (["--numbers", str(self.numbers)] if self.numbers else [])

    def record(self, case: str, variant: str, measure: str, value: object, unit: str = "") -> None:
        """One line of the numbers; whole, whoever else writes to the file."""
        if self.numbers is None:
            return
        with self.numbers.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow((self.name, case, variant, measure, value, unit))


def begin(name: str, arguments: list[str] | None = None, needs: Iterable[str] = ()) -> Step:
    """Reads the arguments of a step, and ends the process where a package or the GPU is missing."""
    parser = argparse.ArgumentParser(prog=f"python -m gpu.{name}")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--numbers", type=pathlib.Path)
    parser.add_argument("--part")
    parser.add_argument("--variants", default="")
    options = parser.parse_args(arguments)
    for package in needs:
        if importlib.util.find_spec(package) is None:
            skip(f"needs {package}, which is not installed")
    if not options.rehearse and not torch.cuda.is_available():
        skip("torch finds no GPU")
    if options.rehearse:
        torch.set_num_threads(1)
    variants = [file for file in options.variants.split(",") if file]
    end = time.monotonic() + options.seconds
    return Step(name, options.rehearse, end, options.numbers, options.part, variants)


def skip(reason: str) -> NoReturn:
    """Ends the process: there is nothing to do here."""
    print(f"skipped: {reason}", flush=True)
    sys.exit(SKIPPED)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def program(name: str, *elsewhere: str) -> str | None:
    """A program of CUDA's toolkit: on the PATH, or where it is installed."""
    found = shutil.which(name)
    for pattern in () if found else elsewhere:
        found = found or next((str(path) for path in sorted(pathlib.Path("/").glob(pattern), reverse=True)), None)
    return found


def table(headers: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Columns as wide as they need be, the first to the left and the others to the right."""
    lines = [[*headers], *([*map(str, row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: list[str]) -> str:
        aligned = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *aligned]).rstrip()

    return "\n".join(map(line, lines))


def attempt(what: str, function: Callable[[], T]) -> T | None:
    """The function's result; None where it fails, which is told in a line, and the step goes on."""
    try:
        return function()
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"FAILED: {what}: {type(error).__name__}: {reason[:300]}", flush=True)
        return None
