"""Fails where C++ or CUDA code includes something of torch that is outside the stable ABI.

One build serves every torch from 2.10 only as long as it uses nothing else.
"""

import pathlib
import re
import sys
from collections.abc import Iterable, Iterator

CSRC = pathlib.Path(__file__).resolve().parent.parent / "csrc"
SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".hpp"}
INCLUDE = re.compile(r'^\s*#\s*(?:include|include_next|import)\s*[<"]([^>"]+)[>"]')
OF_TORCH = re.compile(r"(?:^|/)(?:torch|ATen|c10|caffe2|torchgen|pybind11)/|(?:^|/)Python\.h$")
STABLE = re.compile(r"^torch/(?:csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/")


def offences(sources: Iterable[pathlib.Path]) -> Iterator[str]:
    """``file:line: header`` of every include that the stable ABI does not cover."""
    for source in sources:
        for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            if match and OF_TORCH.search(match[1]) and not STABLE.match(match[1]):
                yield f"{source}:{number}: {match[1]}"


def sources(root: pathlib.Path = CSRC) -> list[pathlib.Path]:
    """The C++ and CUDA files below ``root``."""
    return sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)


def main() -> int:
    """Returns 1 and prints the offences where there are any."""
    found = list(offences(sources()))
    for offence in found:
        print(f"{offence} is outside the stable ABI of torch", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
