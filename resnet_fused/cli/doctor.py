"""``python -m resnet_fused doctor``: what is installed, and which backend serves which device and why."""

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from ..measure import cpu_name
from ..ops import OPERATORS, backend, library, triton_kernels
from ..ops.torch_private import has_kernel
from ..tables import table

_LIBRARIES = {"_ops": "schemas of the operators", "_cpu": "CPU kernels", "_cuda": "CUDA kernels"}
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}


def examine() -> dict[str, Any]:
    """Everything the doctor knows, in values that JSON can hold."""
    return {
        "versions": _versions(),
        "devices": [_device(*device) for device in _devices()],
        "libraries": [*map(_library, _LIBRARIES), *_emulated()],
        "cpu_capability": library.cpu_capability(),
        "cuda_architectures": library.cuda_architectures(),
        "triton": _triton(),
        "threads": torch.get_num_threads(),
        "RESNET_FUSED_BACKEND": os.environ.get("RESNET_FUSED_BACKEND"),
    }


def healthy(findings: dict[str, Any]) -> bool:
    """Whether fused kernels serve at least the CPU, or, in a package that has none for it, a GPU."""
    served = {device["device"].partition(":")[0] for device in findings["devices"] if device["fused"]}
    return "cpu" in served or (bool(served) and library.why_no_cpu() is not None)


def render(findings: dict[str, Any]) -> str:
    """The findings as tables."""
    environment = [*findings["versions"].items()]
    environment.append(("CPU capability of the kernels", findings["cpu_capability"]))
    environment.append(("CUDA kernels are compiled for", findings["cuda_architectures"] or "nothing: none are loaded"))
    environment.append(("Triton kernels", findings["triton"]))
    environment.append(("threads", findings["threads"]))
    environment.append(("RESNET_FUSED_BACKEND", findings["RESNET_FUSED_BACKEND"] or "not set (auto)"))
    devices = [(d["device"], d["name"], d["backend"], d["reason"]) for d in findings["devices"]]
    libraries = [(entry["holds"], entry["state"], entry["path"], entry["reason"]) for entry in findings["libraries"]]
    by_device = {d["device"].partition(":")[0]: d["fused"] for d in findings["devices"]}
    verdict = (
        "Fused kernels serve the CPU."
        if by_device["cpu"]
        else "Fused kernels do not serve the CPU: the unfused maths runs in their place, correct and no faster."
    )
    return "\n\n".join(
        [
            table(environment),
            table(devices, ("device", "name", "backend", "why")),
            table(libraries, ("library", "state", "path", "why")),
            verdict,
        ]
    )


def serves(device: torch.device) -> tuple[str, str]:
    """The backend that serves ``device``, ``"compiled"``, ``"triton"`` or ``"reference"``, and why."""
    choice = backend.current()
    if choice == "reference":
        return "reference", "RESNET_FUSED_BACKEND or backend() asks for the unfused torch operations"
    served_by, reason = backend.serving(device)
    missing = missing_kernels(device)
    if served_by != "reference" and missing:
        reason = f"{len(missing)} of {len(OPERATORS)} operators have no {served_by} kernel for it, such as {missing[0]}"
        served_by = "reference"
    if served_by == "triton":
        because = f", as {reason}" if reason else ""
        if triton_kernels.is_interpreted():
            because += ", run by Triton's interpreter"
        return "triton", f"all {len(OPERATORS)} operators have a Triton kernel for it{because}"
    if served_by == "compiled" and library.EMULATED and device.type == "cpu":
        return "compiled", f"all {len(OPERATORS)} operators have a CUDA kernel for it, run by an emulator"
    if served_by == "compiled":
        return "compiled", f"all {len(OPERATORS)} operators have a compiled kernel for it"
    if choice != "auto":
        reason += f"; RESNET_FUSED_BACKEND or backend() asks for {choice} kernels, so a call raises an error"
    return "reference", reason


def missing_kernels(device: torch.device) -> list[str]:
    """The operators that have no kernel for ``device``, as torch's dispatcher knows them."""
    key = _DISPATCH_KEYS.get(device.type)
    return [name for name in OPERATORS if key is None or not has_kernel(name, key)]


def _triton() -> str:
    """For which kinds of devices torch's dispatcher has the Triton kernels."""
    kinds = [kind for kind in triton_kernels.KEYS if triton_kernels.serves(kind)]
    if kinds:
        return f"registered for {', '.join(kinds)}"
    return "not registered" if importlib.util.find_spec("triton") else "none: Triton is not installed"


def _versions() -> dict[str, str]:
    names = {"resnet_fused": "resnet_fused", "torch": "torch", "torchvision": "torchvision", "triton": "triton"}
    versions = {name: _version(package) for name, package in names.items()}
    versions["torch"] = torch.__version__
    versions["CUDA of torch"] = torch.version.cuda or "none: torch is built without CUDA"
    versions["Python"] = platform.python_version()
    versions["platform"] = platform.platform()
    return versions


def _version(package: str) -> str:
    if package == "resnet_fused":
        from .. import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" if importlib.util.find_spec(package) is None else "of unknown version"


def _devices() -> list[tuple[torch.device, str]]:
    devices = [(torch.device("cpu"), cpu_name())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            devices.append((torch.device("cuda", index), torch.cuda.get_device_name(index)))
    if torch.backends.mps.is_available():
        devices.append((torch.device("mps"), platform.processor()))
    if torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            devices.append((torch.device("xpu", index), torch.xpu.get_device_name(index)))
    return devices


def _device(device: torch.device, name: str) -> dict[str, Any]:
    served_by, reason = serves(device)
    return {
        "device": str(device),
        "name": name,
        "backend": served_by,
        "fused": served_by != "reference",
        "reason": reason,
    }


def _library(name: str) -> dict[str, Any]:
    path = library.path(name)
    loaded = str(path) in torch.ops.loaded_libraries
    state = "loaded" if loaded else "not loaded" if path.is_file() else "not built"
    why = {"_cuda": library.why_no_cuda, "_cpu": library.why_no_cpu, "_ops": library.why_no_cpu}[name]
    reason = None if loaded else why()
    if name == "_cpu" and library.EMULATED:
        reason = "RESNET_FUSED_EMULATED has CUDA kernels serve CPU tensors"
    return _entry(name, _LIBRARIES[name], path, state, reason)


def _emulated() -> list[dict[str, Any]]:
    """The CUDA library that serves CPU tensors, where it does."""
    if library.EMULATED is None:
        return []
    holds, reason = "CUDA kernels on the CPU, emulated", "RESNET_FUSED_EMULATED asks for it"
    return [_entry("emulated", holds, library.EMULATED, "loaded", reason)]


def _entry(name: str, holds: str, path: object, state: str, reason: str | None) -> dict[str, Any]:
    loaded = state == "loaded"
    return {"name": name, "holds": holds, "path": str(path), "loaded": loaded, "state": state, "reason": reason}
