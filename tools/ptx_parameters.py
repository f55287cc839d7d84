"""Has the PTX inside a library read kernel parameters by their names.

nvcc puts the address of a kernel's parameters into a register where several blocks of code read them. The emulator
counts a read through a register as one of global memory, lane by lane, and parameters are none. In a copy of the
library, for counting alone, ``[%rd1+8]`` becomes ``[kernel_param_0+8]`` again: the same read, told apart. Nothing else
changes; lines of debug information give the room.
"""

import pathlib
import re

_IMAGE = re.compile(rb"\.version \d+\.\d+\s+\.target sm_[^\0]*")
_KERNEL = re.compile(r"^(?:\.visible |\.weak )?\.entry .*?^\}", re.MULTILINE | re.DOTALL)
_ADDRESS = re.compile(r"\bmov\.[bu]64\s+(%rd\d+), (\w+_param_\d+);")
_OFFSET = re.compile(r"\badd\.s64\s+(%rd\d+), (%rd\d+), (-?\d+);")
_READ = re.compile(r"(\bld\.param\.\S+\s+[^,\[]+, |\bld\.param\.\S+\s+\{[^}]*\}, )\[(%rd\d+)(?:\+(-?\d+))?\]")


def named(kernel: str) -> str:
    """A kernel's PTX with its parameters read by name."""
    written = re.findall(r"^\s*(?:@!?%p\d+ )?[a-z][\w.:]*\s+(%rd\d+)\b", kernel, re.MULTILINE)
    once = {register for register in written if written.count(register) == 1}
    bases = {register: (name, 0) for register, name in _ADDRESS.findall(kernel) if register in once}
    for register, base, offset in _OFFSET.findall(kernel):
        if register in once and base in bases:
            name, before = bases[base]
            bases[register] = name, before + int(offset)

    def read(match: re.Match) -> str:
        if match[2] not in bases:
            return match[0]
        name, before = bases[match[2]]
        return f"{match[1]}[{name}+{before + int(match[3] or 0)}]"

    return _READ.sub(read, kernel)


def _rewritten(image: bytes) -> bytes:
    text = image.decode()
    new = _KERNEL.sub(lambda match: named(match[0]), text)
    new = re.sub(r"^[ \t]*\.loc\t?.*\n", "", new, flags=re.MULTILINE)
    if len(new) > len(text):
        raise ValueError("the PTX has grown: it was built without -lineinfo")
    return new.ljust(len(text), "\n").encode()


def copy(library: pathlib.Path, to: pathlib.Path) -> None:
    """Writes the copy of a library whose PTX is not compressed."""
    content = library.read_bytes()
    rewritten = _IMAGE.sub(lambda match: _rewritten(match[0]), content)
    if rewritten == content:
        raise ValueError(f"{library} has no PTX that could be read")
    to.write_bytes(rewritten)
