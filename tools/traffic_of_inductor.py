"""Counts the bytes that torch.compile's kernels for BN + add + ReLU move, by the emulator that counts ours.

    python tools/traffic_of_inductor.py SOURCE

SOURCE is Inductor's output code of forward and backward, each behind a line ``# forward`` or ``# backward``. Its Triton
kernels are compiled for a GPU that is not there, and run in the order and with the buffers of that code. One JSON
object a line, as of `make traffic`; needs triton, and the emulator on the PYTHONPATH.
"""

import argparse
import contextlib
import importlib.util
import json
import pathlib
import re
import sys
import tempfile
import types

import torch

# Sizes of blocks decide about time, not about which bytes are touched.
BLOCKS = {"XBLOCK": {"pointwise": 512, "reduction": 32}, "R0_BLOCK": {"reduction": 64}, "YBLOCK": {"pointwise": 32}}
_DECORATOR = re.compile(r"@triton_heuristics\.(\w+)\(.*?\n\)\n(?=@triton\.jit)", re.DOTALL)


class Kernel:
    """One of Inductor's kernels, compiled at its first launch."""

    def __init__(self, name: str, source: str, launches: list[dict], directory: pathlib.Path):
        self.name, self._launches = name, launches
        decorator = _DECORATOR.search(source)
        self._kind = "pointwise" if decorator[1] == "pointwise" else "reduction"
        self._signature = eval(re.search(r"'signature': (\{.*?\})", decorator[0])[1])
        text = _DECORATOR.sub("", source).replace("triton_helpers.set_driver_to_gpu()", "")
        path = directory / f"{name}_{len(list(directory.iterdir()))}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._function = getattr(module, name)
        self._compiled = None

    def _constants(self) -> dict[str, int]:
        names = [name for name, kind in self._signature.items() if kind == "constexpr"]
        return {name: BLOCKS[name][self._kind] for name in names}

    def _compile(self):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = list(self._signature)
        constants = {(names.index(name),): value for name, value in self._constants().items()}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(self._signature.values()) if "*" in kind}
        import triton

        source = ASTSource(self._function, self._signature, constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", 80, 32))

    def run(self, *arguments, stream=None) -> None:
        """Runs it as Inductor's code does, and notes what it moved."""
        import cuda_on_cpu

        self._compiled = self._compiled or self._compile()
        sizes = dict(zip(self._signature, arguments, strict=False))
        blocks = self._constants()
        grid = [-(-sizes["xnumel"] // blocks["XBLOCK"])]
        if "ynumel" in sizes:
            grid.append(-(-sizes["ynumel"] // blocks["YBLOCK"]))
        counted = cuda_on_cpu.run_triton(self._compiled, tuple(grid), list(arguments), check_races=False, warn="ignore")
        self._launches.append({"kernel": self.name} | counted)


def namespace(code: str, launches: list[dict], directory: pathlib.Path) -> dict:
    """Inductor's module with our kernels, on CPU tensors."""
    compiler = types.SimpleNamespace(
        triton=lambda name, source, device_str: Kernel(name, source, launches, directory), wait=lambda scope: None
    )
    code = re.sub(r"^async_compile = AsyncCompile\(\)", "async_compile = _compiler", code, flags=re.MULTILINE)
    members = {"_compiler": compiler, "__name__": "inductor_code"}
    exec(compile(code, "inductor_code", "exec"), members)

    def unchecked(*_):
        return None

    members |= {
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype).zero_(),
        "assert_size_stride": unchecked,
        "assert_size_stride_grouped": unchecked,
        "copy_if_misaligned": lambda tensor: tensor,
        "get_raw_stream": lambda index: 0,
    }
    return members


def _arguments(code: str) -> list[torch.Tensor]:
    """Tensors of the shapes that the code expects."""
    found = re.findall(r"= rand_strided\((\(.*?\)), (\(.*?\)), device='cuda:0', dtype=torch\.(\w+)\)", code)
    tensors = []
    for size, stride, dtype in found:
        tensor = torch.empty_strided(eval(size), eval(stride), dtype=getattr(torch, dtype))
        tensors.append(tensor.fill_(True) if dtype == "bool" else tensor.normal_())
    return tensors


def count(text: str) -> list[dict]:
    """What each direction moved."""
    torch.cuda._DeviceGuard = lambda index: contextlib.nullcontext()
    torch.cuda.set_device = lambda index: None
    lines = []
    parts = re.split(r"^# (forward|backward)\b.*$", text, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as directory:
        for direction, code in zip(parts[1::2], parts[2::2], strict=True):
            launches: list[dict] = []
            members = namespace(code, launches, pathlib.Path(directory))
            arguments = _arguments(code)
            size = max(tensor.nbytes for tensor in arguments)
            full = next(tensor for tensor in arguments if tensor.nbytes == size)
            members["call"](arguments)
            moved = sum(launch["unique_read_bytes"] + launch["unique_write_bytes"] for launch in launches)
            lines.append(
                {
                    "operator": "bn_add_relu by torch.compile",
                    "direction": direction,
                    "dtype": str(full.dtype).removeprefix("torch."),
                    "shape": list(full.shape),
                    "launches": len(launches),
                    "E": round(moved / size, 4),
                    "kernels": [launch["kernel"] for launch in launches],
                }
            )
    return lines


def main() -> int:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=pathlib.Path)
    for line in count(parser.parse_args().source.read_text(encoding="utf-8")):
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
