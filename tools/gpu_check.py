"""On a machine with a GPU: proves and times everything, in seven minutes, with any Python that has torch.

    python tools/gpu_check.py [--out DIR] [--minutes 7] [--only STEP ...] [--variants A.so,B.so]
    python tools/gpu_check.py --rehearse    # every step at tiny sizes on the CPU, for a machine without one

Each step is a process of ``tools/gpu``, ends at its limit, and leaves the others alone if it fails. DIR/report.md and
DIR/numbers.csv are written as it goes: a run that is cut short has told what it knew. The short tables come last.

Returns 1 where a step failed or was killed, or where there was no time to begin it.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Of tools/gpu/step.py, which imports torch.
SKIPPED, SHORT = 77, "--- in short"
# Characters of the closing tables, all together.
CLOSING = 11_500
# Seconds: what a step may take beyond its time, to end by itself; what is too little to begin one; what a step may take
# where it is but rehearsed.
GRACE, LEAST, REHEARSAL = 20, 10, 240


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step, its seconds of the default seven minutes, and whether it runs beside its untimed neighbours."""

    name: str
    seconds: float
    says: str
    untimed: bool = False


PLAN = (
    Planned("libraries", 5, "takes the libraries of the checkout, and builds what is missing"),
    Planned("info", 25, "versions, who serves, clocks, speed of a copy, host time of a launch"),
    Planned("values", 95, "every operator against float64 in memory full of NaN; the same bits twice", True),
    Planned("streams", 95, "CUDA graphs captured and replayed, two streams", True),
    Planned("suite", 95, "the operators' tests with --backend cuda", True),
    Planned("sanitizer", 95, "memcheck, racecheck, synccheck on our kernels", True),
    Planned("prepare", 95, "compiles what torch.compile needs later", True),
    Planned("bandwidth", 85, "microseconds, GB/s and share of a copy at the shapes of ResNet-50"),
    Planned("networks", 110, "img/s and peak memory of ResNet-50, and our kernels' share of a step"),
    Planned("host", 35, "what a call costs on the host, with and without CUDA graphs"),
    Planned("counters", 30, "Nsight Compute: bytes, occupancy, L2 hits, issue slots of three kernels"),
    Planned("convolutions", 30, "a 1x1 convolution with BatchNorm before and statistics behind it, in Triton"),
)


def rounds(plan: tuple[Planned, ...]) -> list[list[Planned]]:
    """What runs at once: untimed neighbours together, every other step alone."""
    result: list[list[Planned]] = []
    for step in plan:
        if step.untimed and result and result[-1][0].untimed:
            result[-1].append(step)
        else:
            result.append([step])
    return result


@dataclasses.dataclass
class Running:
    """A step's process, its log, and what became of it."""

    step: Planned
    log: pathlib.Path
    outcome: str = "not begun: no time was left"
    failed: bool = True
    began: float = 0.0
    seconds: float = 0.0
    limit: float = 0.0
    process: subprocess.Popen | None = None

    def start(self, command: list[str], environment: dict[str, str], limit: float) -> None:
        """In a group of its own, so that all of it ends at the limit."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        self.began, self.limit, self.outcome = time.monotonic(), limit, "running"

    def is_over(self) -> bool:
        """Looks after the process: whether it has ended, or has been ended."""
        self.seconds = time.monotonic() - self.began
        code = self.process.poll()
        if code is None and self.seconds < self.limit:
            return False
        self.kill()
        self.failed = code not in (0, SKIPPED)
        if code is None:
            self.outcome = f"FAILED: killed after {self.seconds:.0f} s, its limit"
        else:
            self.outcome = {0: "ok", SKIPPED: "skipped"}.get(code, f"FAILED: status {code}")
        return True

    def kill(self) -> None:
        """Ends all that the step started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def short(self) -> str:
        """The end of it that matters."""
        text = self.text().rstrip()
        if SHORT in text:
            return text.rpartition(SHORT)[2].strip()
        return "\n".join(text.splitlines()[-60:])


class Report:
    """DIR/report.md, written anew whenever there is something to add."""

    def __init__(self, path: pathlib.Path, title: str, steps: list[Running]):
        self.path, self.title, self.steps = path, title, steps
        self._written = ""

    def write(self) -> None:
        """Replaces the file in one move."""
        text = f"# {self.title}\n"
        for running in self.steps:
            took = f" in {running.seconds:.0f} s" if running.process else ""
            text += f"\n## {running.step.name}: {running.outcome}{took}\n"
            if running.text():
                text += f"\n```\n{running.text().rstrip()}\n```\n"
        if text != self._written:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path)
            self._written = text


def closing(steps: list[Running], limit: int = CLOSING) -> str:
    """The short tables, the longest cut where all are too long, and a line for each step."""
    ends = "\n".join(f"{r.step.name:13} {r.outcome} ({r.seconds:.0f} s)" for r in steps)
    texts = [(r.step.name, r.short()) for r in steps if r.process]
    room, cap = limit - len(ends) - 40 * len(texts), 0
    while cap < limit and sum(min(len(text), cap + 100) for _, text in texts) <= room:
        cap += 100
    parts = []
    for name, text in texts:
        cut = text if len(text) <= cap else "(more in the report)\n" + "\n".join(text[-cap:].splitlines()[1:])
        parts.append(f"==== {name}\n{cut}\n")
    return "\n".join([*parts, ends])


def environment(rehearse: bool, caches: pathlib.Path) -> dict[str, str]:
    """Of the steps: this checkout's package first, and caches that the steps share."""
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH")]
    result = {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    return result | ({"OMP_NUM_THREADS": "1"} if rehearse else {})


def command(name: str, seconds: float, options: argparse.Namespace) -> list[str]:
    """What runs a step."""
    given = ["--seconds", f"{seconds:.0f}", "--numbers", str(options.out / "numbers.csv")]
    given += ["--rehearse"] * options.rehearse
    given += ["--variants", options.variants] if options.variants else []
    return [sys.executable, "-u", "-m", f"gpu.{name}", *given]


def run(plan: list[Running], options: argparse.Namespace, report: Report, caches: pathlib.Path) -> None:
    """Runs the steps in the time there is, whatever becomes of each."""
    end = time.monotonic() + 60 * options.minutes
    by_step = {running.step: running for running in plan}
    groups = rounds(tuple(by_step))
    try:
        for number, group in enumerate(groups):
            left = end - time.monotonic()
            wanted = sum(max(step.seconds for step in later) for later in groups[number:])
            share = min(options.minutes / 7, left / wanted)
            if left < LEAST:
                continue
            running = [by_step[step] for step in group]
            for one in running:
                seconds = one.step.seconds * (1 if options.rehearse else share)
                # A build takes what it takes; the steps after it have less.
                limit = min(left, 240) if one.step.name == "libraries" else min(seconds + GRACE, left + GRACE)
                limit = REHEARSAL if options.rehearse else limit
                one.start(command(one.step.name, seconds, options), environment(options.rehearse, caches), limit)
            while running:
                time.sleep(0.2)
                over = [one for one in running if one.is_over()]
                for one in over:
                    running.remove(one)
                    print(f"{one.step.name}: {one.outcome} in {one.seconds:.0f} s", flush=True)
                report.write()
    finally:
        for one in plan:
            if one.process is not None and one.process.poll() is None:
                one.kill()
                one.outcome = "FAILED: the run was ended"
        report.write()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, and what follows from it."""
    epilog = "steps, most valuable first:\n" + "\n".join(f"  {step.name:13} {step.says}" for step in PLAN)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "gpu-check", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=7, help="for all steps together (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STEP", default=[], help="these steps alone")
    parser.add_argument("--rehearse", action="store_true", help="every step at tiny sizes on the CPU")
    parser.add_argument("--variants", default="", help="builds of the CUDA library to time too: A.so,B.so")
    options = parser.parse_args(arguments)
    unknown = set(options.only) - {step.name for step in PLAN}
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in PLAN)}")
    for file in filter(None, options.variants.split(",")):
        if not pathlib.Path(file).is_file():
            parser.error(f"--variants: {file} is no file")
    options.variants = ",".join(str(pathlib.Path(file).resolve()) for file in options.variants.split(",") if file)
    options.out = options.out.resolve()
    return options


def card() -> str | None:
    """The first GPU's name, as torch has it; None where it finds none."""
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def check(options: argparse.Namespace, title: str) -> int:
    """Runs the plan, writes the report, prints the closing tables; returns 1 where a step did not end well."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "numbers.csv").write_text("step,case,variant,measure,value,unit\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        logs = pathlib.Path(directory)
        steps = [Running(s, logs / f"{s.name}.log") for s in PLAN if s.name in options.only or not options.only]
        report = Report(options.out / "report.md", title, steps)
        run(steps, options, report, logs)
        print("\n" + closing(steps))
        print(f"report: {report.path}; numbers: {options.out / 'numbers.csv'}", flush=True)
        return int(any(running.failed for running in steps))


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where something failed, or where there is no GPU."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    name = "rehearsal on a CPU" if options.rehearse else card()
    if name is None:
        print("gpu-check: torch finds no GPU here; --rehearse runs every step on the CPU", file=sys.stderr)
        return 1
    code = check(options, f"GPU check, {datetime.date.today()}, {name}")
    if not options.rehearse:
        file = f"docs/gpu/{datetime.date.today()}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.md"
        print(f"keep the report as {file}")
    return code


if __name__ == "__main__":
    sys.exit(main())
