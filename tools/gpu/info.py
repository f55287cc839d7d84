"""What is here: versions, the GPU and its clocks, who serves it, the speed of a copy, the host's time for a launch."""

import importlib.util
import platform
import subprocess
import sys
import time

import torch

from .step import SHORT, begin, program, synchronize

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,memory.total"


def main(arguments: list[str] | None = None) -> int:
    """Prints it, versions first."""
    step = begin("info", arguments)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA of torch {torch.version.cuda}"
    print(versions, flush=True)
    card = "CPU"
    if step.device.type == "cuda":
        p = torch.cuda.get_device_properties(0)
        card = f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} SMs"
        print(f"{card}, L2 {p.L2_cache_size / 2**20:.0f} MiB, {p.total_memory / 2**30:.0f} GiB", flush=True)
        if program("nvidia-smi"):
            subprocess.run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"], check=False)
    doctor = subprocess.run([sys.executable, "-m", "resnet_fused", "doctor"], check=False)
    if doctor.returncode and importlib.util.find_spec("tabulate") is None:
        print("doctor needs tabulate, which is not installed")

    from benchmarks import device

    device.choose(step.device.type)
    rate = device.copy_bandwidth(1 << 22 if step.rehearse else 1 << 30)
    step.record("copy", "torch", "bandwidth", rate / 1e9, "GB/s")
    x = torch.ones(1, device=step.device)
    calls = 200 if step.rehearse else 2000
    for _ in range(2):
        synchronize(step.device)
        began = time.perf_counter()
        for _ in range(calls):
            x.add_(1)
        issued = (time.perf_counter() - began) / calls * 1e6
    from resnet_fused.cli.doctor import serves

    print(f"{SHORT}\n{versions}\n{card}")
    print("served by: {}, {}".format(*serves(step.device)))
    print(f"a copy of 1 GiB moves {rate / 1e9:.0f} GB/s, reads and writes together")
    print(f"a launch of torch's add_ costs the host {issued:.1f} us")
    step.record("launch of add_", "torch", "host time", issued, "us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
