"""Compiles the Triton kernels for GPUs that are not there and reads the machine code: one JSON object a kernel and GPU.

    make triton-checks      python tools/triton_checks.py [--target 8.0 gfx942 ...] [--dtype bfloat16] [--json]

For each launch of every operator: registers of a thread, spills, shared memory, and the widest load and store of global
memory. It fails where a kernel spills in the loop that goes over the tensor, or more than a value or two around it,
and where one that is meant for 16-byte accesses has none. NVIDIA's numbers are those of ptxas and of the disassembled
cubin, AMD's those of LLVM's assembly; no GPU is needed.
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import static_checks
import torch
import traffic

# Whole vectors in either layout; small planes and many channels; nothing that vectors would divide.
SHAPES = ((8, 256, 28, 28), (8, 2048, 7, 7), (4, 65, 9, 9))
DTYPES = traffic.DTYPES | {"float16": torch.float16, "float64": torch.float64}
PROCESSORS = 132
# ptxas gives up a register for a value that is needed before and after the loops, where that lets one more block in.
_SPILLS_MOST = 16


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel of an operator on one GPU."""

    operator: str
    direction: str
    kernel: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    target: str
    warps: int
    registers: int
    spills: int  # instructions that go to local or scratch memory
    spills_in_loops: int  # those of innermost loops
    shared: int
    load: int  # bytes of the widest
    store: int

    @property
    def vectorizable(self) -> bool:
        """Whether 16 bytes divide a row or a plane, and the kernel goes over those."""
        _, channels, *positions = self.shape
        inner = torch.Size(positions).numel() if self.layout == "NCHW" else channels
        if self.kernel.startswith("add_relu"):
            inner = torch.Size(self.shape).numel()
        passes = not re.search("merge|finish|running", self.kernel)
        return passes and inner * DTYPES[self.dtype].itemsize % 16 == 0

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.spills_in_loops or self.spills > _SPILLS_MOST:
            found.append(f"{self.spills} instructions spill, {self.spills_in_loops} of them in innermost loops")
        if self.vectorizable and self.load < 16:
            found.append(f"reads no more than {self.load} bytes at once")
        if self.vectorizable and self.store < 16 and not re.search("statistics|reduce", self.kernel):
            found.append(f"writes no more than {self.store} bytes at once")
        what = f"{self.kernel} of {self.operator} {self.direction}, {self.dtype} {self.layout} {self.shape}"
        return [f"{what} on {self.target}: {fault}" for fault in found]


def launches(form: str, direction: str, shape, dtype: torch.dtype, layout: str, lanes: int) -> list:
    """The launches of a call on a GPU of so many lanes a warp, none of which runs."""
    from resnet_fused.triton import configurations, offline

    found: list = []
    # Vectors are float32, beside float64 tensors float64.
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
    with offline.intercepted(found.append, configurations.Device(PROCESSORS, lanes)):
        call = traffic.cases(form, direction, shape, dtype, layout)
        found.clear()
        call()
    torch.set_default_dtype(torch.float32)
    return found


def examine(compiled, target: str, program: str) -> dict[str, int]:
    """Registers, spills, shared memory and widest accesses of what Triton compiled."""
    found = {"shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        return found | _of_amd(compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run([program, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
        (used,) = static_checks.resource_usage(text.stdout).values()
        text = subprocess.run([program, "-sass", file.name], check=True, capture_output=True, text=True)
        ((load, store, spills),) = static_checks.widest_accesses(text.stdout).values()
    found |= {"registers": used["REG"], "spills": spills + used["LOCAL"], "load": load, "store": store}
    return found | {"spills_in_loops": spills_in_loops(text.stdout)}


def spills_in_loops(sass: str) -> int:
    """Accesses to local memory between a branch backwards and its target, where no other branch backwards lies."""
    instructions = [(int(m[1], 16), m[2]) for m in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*)$", sass, re.MULTILINE)]
    loops = []
    for at, text in instructions:
        target = re.search(r"\bBRA(?:\.\w+)* .*?(?:0x)?([0-9a-f]+)\)? ?;", text)
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    innermost = [loop for loop in loops if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    spills = [at for at, text in instructions if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(first <= at <= last for first, last in innermost) for at in spills)


def _of_amd(text: str) -> dict[str, int]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    def widest(kind: str) -> int:
        names = re.findall(rf"\b(?:global|buffer)_{kind}_(dwordx4|dwordx3|dwordx2|dword|\w+)", text)
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
        return max((sizes.get(name, 2) for name in names), default=0)

    spills = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
    counted = {"registers": number("vgpr_count"), "spills": spills, "spills_in_loops": spills}
    return counted | {"load": widest("load"), "store": widest("store")}


def everything(shapes, dtypes, layouts, targets, operator: str | None = None):
    """Every kernel of every operator, or of one."""
    from resnet_fused.ops import triton_kernels
    from resnet_fused.triton import offline

    program = static_checks.cuobjdump()
    triton_kernels._why_not = lambda kind, index: None
    triton_kernels.serve("cpu", True)
    for shape in shapes:
        for dtype in dtypes:
            for layout in layouts:
                for form, direction in traffic.PASSES:
                    if operator not in (None, form):
                        continue
                    for target in targets:
                        lanes = offline.TARGETS[target].warp_size
                        for launch in launches(form, direction, shape, DTYPES[dtype], layout, lanes):
                            compiled = offline.compiled(launch, offline.TARGETS[target])
                            numbers = examine(compiled, target, program)
                            yield Compiled(
                                form, direction, launch.name, dtype, layout, shape, target, launch.warps, **numbers
                            )


def table(found: list[Compiled]) -> str:
    """The worst of every kernel, as Markdown."""
    groups = collections.defaultdict(list)
    for kernel in found:
        groups[kernel.kernel, kernel.target].append(kernel)
    lines = [
        "| kernel | GPU | instances | registers | spills (in loops) | shared, bytes | load | store |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, target), of in sorted(groups.items()):
        wide = [k for k in of if k.vectorizable] or of
        cells = (
            f"`{name}`",
            target,
            len(of),
            max(k.registers for k in of),
            f"{max(k.spills for k in of)} ({max(k.spills_in_loops for k in of)})",
            max(k.shared for k in of),
            min(k.load for k in wide),
            min(k.store for k in wide),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Returns 1 where a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    if importlib.util.find_spec("triton") is None or static_checks.cuobjdump() is None:
        print("nothing to check: Triton, which brings its compilers, is not installed", file=sys.stderr)
        return 1
    from resnet_fused.triton import offline

    parser.add_argument("--target", choices=offline.TARGETS, nargs="+", default=list(offline.TARGETS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(traffic.DTYPES))
    parser.add_argument("--layout", choices=traffic.LAYOUTS, nargs="+", default=list(traffic.LAYOUTS))
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split(","))), help="one shape only: N,C,H,W")
    parser.add_argument("--operator", choices=sorted({form for form, _ in traffic.PASSES}), help="one operator only")
    parser.add_argument("--table", action="store_true", help="print the worst of each kernel as Markdown at the end")
    options = parser.parse_args()
    found, sentences = [], []
    shapes = (options.shape,) if options.shape else SHAPES
    for kernel in everything(shapes, options.dtype, options.layout, options.target, options.operator):
        if kernel in found:
            continue
        found.append(kernel)
        sentences += kernel.faults()
        print(json.dumps(dataclasses.asdict(kernel)), flush=True)
    if options.table:
        print(table(found))
    for sentence in dict.fromkeys(sentences):
        print(sentence, file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
