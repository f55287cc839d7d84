"""Nsight Compute on the kernels of three operators: bytes of DRAM, occupancy, L2 hits, issue slots."""

import csv
import re
import subprocess
import sys

from .step import SHORT, begin, program, skip, table

# What is asked of the hardware: a heading, and the name that Nsight Compute has for it.
METRICS = {
    "us": "gpu__time_duration.sum",
    "MB read": "dram__bytes_read.sum",
    "MB written": "dram__bytes_write.sum",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "L2 hit %": "lts__t_sector_hit_rate.pct",
    "issue %": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "waves": "launch__waves_per_multiprocessor",
}
# Nsight Compute chooses a unit for each column.
TO_UNIT = {"us": {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}}
TO_UNIT["MB read"] = TO_UNIT["MB written"] = {"byte": 1e-6, "Kbyte": 1e-3, "Gbyte": 1e3}


def parse(text: str) -> list[dict[str, str]]:
    """The kernels of ``--csv --page raw``, whose first row has the units, in the units of our headings."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    units, *rows = csv.DictReader(lines) if len(lines) > 1 else [{}]
    found = []
    for row in rows:
        kernel = {"kernel": re.sub(r"^void |resnet_fused::cuda::|\(anonymous namespace\)::", "", row["Kernel Name"])}
        for heading, metric in METRICS.items():
            value = row.get(metric, "").replace(",", "")
            if re.fullmatch(r"[-+.\deE]+", value):
                value = f"{float(value) * TO_UNIT.get(heading, {}).get(units.get(metric), 1):.4g}"
            kernel[heading] = value
        found.append(kernel)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where the calls do not run."""
    step = begin("counters", arguments, needs=["numpy"])
    size = "tiny" if step.rehearse else "large"
    calls = [sys.executable, "-m", "gpu.calls", step.device.type, size]
    ncu = None if step.rehearse else program("ncu", "usr/local/cuda*/bin/ncu", "opt/nvidia/nsight-compute/*/ncu")
    if ncu is None:
        print("there is no Nsight Compute; the calls alone:", flush=True)
        return subprocess.run(calls, check=False).returncode
    # Clocks and caches as they are: the card's settings are left alone.
    command = [ncu, "--clock-control", "none", "--cache-control", "none", "--csv", "--page", "raw"]
    command += ["--metrics", ",".join(METRICS.values()), "-k", "regex:batch_norm|add_relu|running"]
    try:
        done = subprocess.run([*command, *calls], capture_output=True, text=True, timeout=step.left(), check=False)
    except subprocess.TimeoutExpired:
        skip("Nsight Compute was not done in its time")
    found = parse(done.stdout)
    if not found:
        print(done.stdout[-1500:], done.stderr[-1500:])
        if "calls done" in done.stdout:
            skip("Nsight Compute read no counters")
        return 1
    for number, kernel in enumerate(found):
        for heading in METRICS:
            step.record(f"{number}: {kernel['kernel'][:120]}", "ncu", heading, kernel[heading])
        print(kernel["kernel"][:200])
    print(SHORT)
    print(table(("kernel", *METRICS), [[k["kernel"].partition("(")[0][:48], *(k[h] for h in METRICS)] for k in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
