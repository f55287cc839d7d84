"""Reads the machine code of the CUDA library, and fails where a kernel spills, is narrow or takes too many registers.

    make static             python tools/static_checks.py [--json] [--no-docs] [LIBRARY]

For each kernel and architecture: registers, spills, stack, shared memory, threads that an SM holds at that many
registers, and the widest access to global memory. All instances of a kernel's template are checked; the table, which
is written into docs/kernels.md, has the worst of them. No GPU is needed: cuobjdump, of the CUDA toolkit or of the
triton wheel, tells all that the table has.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "resnet_fused" / "_cuda.abi3.so"
TABLE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- begin: make static -->", "<!-- end: make static -->"


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What an SM holds. From the table of technical specifications of the CUDA C++ Programming Guide."""

    threads: int
    blocks: int
    shared: int
    registers: int = 65536


# Those that are checked: the data center GPUs of three generations, and the newest of the others.
ARCHITECTURES = {
    "8.0": Multiprocessor(2048, 32, 164 << 10),
    "9.0": Multiprocessor(2048, 32, 228 << 10),
    "10.0": Multiprocessor(2048, 32, 228 << 10),
    "12.0": Multiprocessor(1536, 24, 100 << 10),
}
# kOwnShared of csrc/cuda/device.h: with no more than this, a launch knows when it has to ask for dynamic shared memory.
OWN_SHARED = 16 << 10
# Bytes of loads that an SM needs under way to keep its memory busy. By Little's law they are its share of 3.35 TB/s, on
# an H100, times the latency: 20 KB at 0.8 us, and twice that where the memory is loaded. Every kernel has two accesses
# of 16 bytes for half of the threads, which are 32 KiB there; with this many bytes it may have fewer threads.
LEAST_OF_THREAD, ENOUGH_UNDER_WAY = 32, 40 << 10
SIZES = {"double": 8, "float": 4}  # any other type has two bytes


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instance of a kernel on one architecture."""

    name: str  # demangled, without return type and parameters
    architecture: str
    registers: int
    spills: int  # instructions that go to local memory
    stack: int
    shared: int  # static; what a launch adds is not known here
    block: int  # the most threads of a block, by its launch bounds
    load: int  # bytes of the widest
    store: int
    under_way: int  # bytes of a thread's loads in a loop before it needs the first of them

    @property
    def template(self) -> str:
        """The name without arguments."""
        return self.name.partition("<")[0]

    @property
    def threads(self) -> int:
        """Threads that an SM holds: whole blocks, as many as registers and static shared memory allow."""
        sm = ARCHITECTURES[self.architecture]
        # Registers go to warps in units of 256, and each of an SM's four parts has a quarter of them.
        of_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        warps = sm.registers // 4 // of_warp * 4
        blocks = min(warps // -(-self.block // 32), sm.blocks, sm.threads // self.block)
        if self.shared:
            # The system keeps a KiB of every block's.
            blocks = min(blocks, sm.shared // (self.shared + 1024))
        return blocks * self.block

    @property
    def access(self) -> int | None:
        """Bytes of the accesses that the kernel is meant to make: the type times the number, its first arguments."""
        match = re.match(r"[^<]*<([\w:]+)[^,<>]*, \(?(?:int\))?(\d+)", self.name)
        if match is None:
            return None
        return SIZES.get(match[1], 2) * int(match[2])

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.spills:
            found.append(f"{self.spills} instructions go to local memory")
        if self.stack:
            found.append(f"has {self.stack} bytes of stack")
        if self.shared > OWN_SHARED:
            found.append(f"has {self.shared} bytes of shared memory, more than kOwnShared of csrc/cuda/device.h")
        half = ARCHITECTURES[self.architecture].threads // 2
        if self.threads < half and self.threads * self.under_way < ENOUGH_UNDER_WAY:
            found.append(f"{self.registers} registers leave an SM {self.threads} threads, fewer than {half}")
        if self.access is not None and self.access >= 16:
            if self.load < 16:
                found.append(f"reads no more than {self.load} bytes at once")
            if self.store < 16 and not _reduces(self.name):
                found.append(f"writes no more than {self.store} bytes at once")
            if self.threads * self.under_way < half * LEAST_OF_THREAD:
                found.append(f"has {self.under_way} bytes of loads under way a thread, of {self.threads} threads")
        return [f"{self.name} on {self.architecture}: {fault}" for fault in found]


def _reduces(name: str) -> bool:
    """Whether its results are sums: there is no tensor that it writes."""
    return "statistics" in name or "reduce" in name or "sums" in name


def cuobjdump() -> str | None:
    """The program, of the toolkit or of the triton wheel."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import cuda_toolkit

    try:
        places = [cuda_toolkit.find().root / "bin"]
    except cuda_toolkit.Unusable:
        places = []
    for directory in dict.fromkeys([sysconfig.get_path("platlib"), *sys.path]):
        places.append(pathlib.Path(directory, "triton", "backends", "nvidia", "bin"))
    return next((str(place / "cuobjdump") for place in places if (place / "cuobjdump").is_file()), None)


def kernels(library: pathlib.Path, program: str) -> Iterator[Kernel]:
    """The kernels of a library, on every architecture that is checked and that it has code for."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([program, "-xelf", "all", library.resolve()], cwd=directory, check=True, capture_output=True)
        for cubin in sorted(pathlib.Path(directory).glob("*.cubin")):
            number = re.search(r"sm_(\d+)(\d)[af]?\.cubin$", cubin.name)
            architecture = f"{number[1]}.{number[2]}"
            if architecture in ARCHITECTURES:
                yield from _kernels_of(cubin, architecture, program)


def _kernels_of(cubin: pathlib.Path, architecture: str, program: str) -> Iterator[Kernel]:
    usage = resource_usage(_run(program, "--dump-resource-usage", cubin))
    if not usage:
        return
    sass = _run(program, "-sass", cubin)
    accesses, under_way = widest_accesses(sass), loads_under_way(sass)
    bounds = launch_bounds(cubin.read_bytes())
    names = dict(zip(usage, demangled(usage), strict=True))
    for mangled, used in usage.items():
        load, store, spills = accesses[mangled]
        yield Kernel(
            names[mangled],
            architecture,
            used["REG"],
            spills,
            used["STACK"] + used["LOCAL"],
            used["SHARED"],
            bounds.get(mangled, 1024),
            load,
            store,
            under_way.get(mangled, 0),
        )


def _run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resource_usage(text: str) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED and LOCAL of every function that cuobjdump --dump-resource-usage names."""
    found = re.findall(r"Function (\S+):\s*\n\s*(.*)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", used)}
        for name, used in found
    }


def widest_accesses(sass: str) -> dict[str, tuple[int, int, int]]:
    """Of every function: bytes of the widest load and store in global memory, and instructions on local memory."""
    found: dict[str, tuple[int, int, int]] = collections.defaultdict(lambda: (0, 0, 0))
    name = ""
    for line in sass.splitlines():
        function = re.match(r"\s*Function : (\S+)", line)
        if function:
            name = function[1]
            continue
        instruction = re.search(r"\b(LDGSTS|LDG|STG|LD|ST|LDL|STL)((?:\.\w+)*)\s", line)
        if instruction is None or not line.lstrip().startswith("/*"):
            continue
        load, store, spills = found[name]
        kind, modifiers = instruction[1], instruction[2]
        if kind in ("LDL", "STL"):
            spills += 1
        elif kind.startswith("LD"):
            load = max(load, _bytes(modifiers))
        else:
            store = max(store, _bytes(modifiers))
        found[name] = load, store, spills
    return found


def loads_under_way(sass: str) -> dict[str, int]:
    """Of every function: bytes of global loads that a thread issues before it needs one, in the loop of most.

    Instructions are taken in the order in which they stand: both sides of a branch count.
    """
    code: dict[str, dict[int, str]] = {}
    for line in sass.splitlines():
        function = re.match(r"\s*Function : (\S+)", line)
        instruction = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line)
        if function:
            instructions = code[function[1]] = {}
        elif instruction:
            instructions[int(instruction[1], 16)] = instruction[2]
    return {name: max(map(_under_way, _loops(instructions)), default=0) for name, instructions in code.items()}


def _loops(instructions: dict[int, str]) -> Iterator[list[str]]:
    """What stands between a jump backwards and its target."""
    for address, text in instructions.items():
        jump = re.match(r"BRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) <= address:
            yield [t for at, t in instructions.items() if int(jump[1], 16) <= at <= address]


def _under_way(loop: list[str]) -> int:
    most = count = 0
    waited_for: set[int] = set()
    for text in loop:
        name, _, operands = text.partition(" ")
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        load = re.match(r"LDG((?:\.\w+)*)$", name)
        if waited_for.intersection(registers if name.startswith("ST") else registers[1:]):
            count = 0
            waited_for.clear()
        if load and registers:
            width = max(_bytes(load[1]), 4)
            waited_for.update(range(registers[0], registers[0] + width // 4))
            count += _bytes(load[1])
            most = max(most, count)
    return most


def _bytes(modifiers: str) -> int:
    for bits in ("256", "128", "64"):
        if f".{bits}" in modifiers:
            return int(bits) // 8
    return 1 if re.search(r"\.[US]8\b", modifiers) else 2 if re.search(r"\.[US]16\b", modifiers) else 4


_MAX_THREADS = 0x05
_SVAL = 0x04


def launch_bounds(cubin: bytes) -> dict[str, int]:
    """The most threads of a block, of every kernel that has launch bounds.

    From the ELF sections ``.nv.info.<kernel>``: entries of a format, an attribute and a value, or of a size and so many
    bytes.
    """
    offset, size, count, names_at = (
        struct.unpack_from("<Q", cubin, 0x28)[0],
        *struct.unpack_from("<HHH", cubin, 0x3A),
    )
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    names = cubin[headers[names_at][4] :]
    found = {}
    for name_at, _, _, _, at, length, *_ in headers:
        name = names[name_at : names.index(b"\0", name_at)].decode()
        if not name.startswith(".nv.info."):
            continue
        end = at + length
        while at < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == _SVAL:
                if attribute == _MAX_THREADS:
                    x, y, z = struct.unpack_from("<III", cubin, at)
                    found[name.removeprefix(".nv.info.")] = x * y * z
                at += value
    return found


def demangled(names: Iterable[str]) -> list[str]:
    """Without return type, namespaces and parameters."""
    names = list(names)
    program = shutil.which("c++filt")
    if program is None:
        return names
    printed = subprocess.run([program, *names], check=True, capture_output=True, text=True).stdout.splitlines()
    return [_short(name) for name in printed]


def _short(name: str) -> str:
    for _ in range(2):
        name = re.sub(r"(?:\w+|\(anonymous namespace\))::", "", name)
    name = re.sub(r"^(?:void|int) ", "", name)
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def table(found: list[Kernel]) -> str:
    """The worst of every kernel's instances, as Markdown."""
    groups: dict[tuple, list[Kernel]] = collections.defaultdict(list)
    for kernel in found:
        wide = kernel.access is not None and kernel.access >= 16
        groups[kernel.template, "16 bytes" if wide else "narrower", kernel.architecture].append(kernel)
    lines = [
        "| kernel | accesses | GPU | instances | registers | spills | shared, bytes | threads an SM | load | store "
        "| under way, KiB an SM |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = list(ARCHITECTURES)
    for (name, kind, architecture), of in sorted(groups.items(), key=lambda g: (*g[0][:2], order.index(g[0][2]))):
        cells = [
            f"`{name}`",
            kind,
            architecture,
            len(of),
            max(k.registers for k in of),
            sum(k.spills for k in of) + sum(k.stack for k in of),
            max(k.shared for k in of),
            f"{min(k.threads for k in of)} of {ARCHITECTURES[architecture].threads}",
            min(k.load for k in of),
            min(k.store for k in of),
            f"{min(k.threads * k.under_way for k in of) / 1024:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def with_table(text: str, new: str) -> str:
    """The document with this table in place of the one it has."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def faults(found: list[Kernel]) -> list[str]:
    """What is wrong, in sentences."""
    missing = [a for a in ARCHITECTURES if not any(kernel.architecture == a for kernel in found)]
    sentences = [f"the library has no code for {a}" for a in missing]
    return sentences + [fault for kernel in found for fault in kernel.faults()]


def main() -> int:
    """Returns 1 where a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", type=pathlib.Path, nargs="?", default=LIBRARY)
    parser.add_argument("--json", action="store_true", help="print every instance as JSON, one a line")
    parser.add_argument("--no-docs", dest="docs", action="store_false", help="leave docs/kernels.md as it is")
    options = parser.parse_args()
    program = cuobjdump()
    if program is None or not options.library.is_file():
        what = f"{options.library} is not built" if program else "there is no cuobjdump: `pip install triton` has one"
        print(f"nothing to check: {what}", file=sys.stderr)
        return 1
    found = list(kernels(options.library, program))
    if options.json:
        for kernel in found:
            print(json.dumps(dataclasses.asdict(kernel) | {"threads": kernel.threads}))
    else:
        print(table(found))
    if options.docs and options.library == LIBRARY:
        TABLE.write_text(with_table(TABLE.read_text(encoding="utf-8"), table(found)), encoding="utf-8")
    sentences = faults(found)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
