"""``python -m resnet_fused doctor``: what is installed, and which backend serves which device and why."""

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch
from tabulate import tabulate

from .measure import cpu_name
from .ops import OPERATORS, backend, library

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
        "threads": torch.get_num_threads(),
        "RESNET_FUSED_BACKEND": os.environ.get("RESNET_FUSED_BACKEND"),
    }


def healthy(findings: dict[str, Any]) -> bool:
    """Whether fused kernels serve at least the CPU."""
    return any(device["device"] == "cpu" and device["fused"] for device in findings["devices"])


def render(findings: dict[str, Any]) -> str:
    """The findings as tables."""
    environment = [*findings["versions"].items()]
    environment.append(("CPU capability of the kernels", findings["cpu_capability"]))
    environment.append(("CUDA kernels are compiled for", findings["cuda_architectures"] or "nothing: none are loaded"))
    environment.append(("threads", findings["threads"]))
    environment.append(("RESNET_FUSED_BACKEND", findings["RESNET_FUSED_BACKEND"] or "not set (auto)"))
    devices = [(d["device"], d["name"], d["backend"], d["reason"]) for d in findings["devices"]]
    libraries = [(entry["holds"], entry["state"], entry["path"], entry["reason"]) for entry in findings["libraries"]]
    verdict = (
        "Fused kernels serve the CPU."
        if healthy(findings)
        else "Fused kernels do not serve the CPU: the unfused maths runs in their place, correct and no faster."
    )
    return "\n\n".join(
        [
            tabulate(environment, tablefmt="simple", disable_numparse=True),
            tabulate(devices, headers=("device", "name", "backend", "why"), tablefmt="simple", disable_numparse=True),
            tabulate(libraries, headers=("library", "state", "path", "why"), tablefmt="simple", disable_numparse=True),
            verdict,
        ]
    )


def serves(device: torch.device) -> tuple[str, str]:
    """The backend that serves ``device``, ``"compiled"`` or ``"reference"``, and why."""
    choice = backend.current()
    missing = missing_kernels(device)
    if choice == "reference":
        return "reference", "RESNET_FUSED_BACKEND or backend() asks for the unfused torch operations"
    reason = backend.why_not_compiled(device)
    if reason is None and missing:
        reason = f"{len(missing)} of {len(OPERATORS)} operators have no compiled kernel for it, such as {missing[0]}"
    if reason is None and library.EMULATED and device.type == "cpu":
        return "compiled", f"all {len(OPERATORS)} operators have a CUDA kernel for it, run by an emulator"
    if reason is None:
        return "compiled", f"all {len(OPERATORS)} operators have a compiled kernel for it"
    if choice == "compiled":
        reason += "; RESNET_FUSED_BACKEND or backend() asks for compiled kernels, so a call raises an error"
    return "reference", reason


def missing_kernels(device: torch.device) -> list[str]:
    """The operators that have no compiled kernel for ``device``, as torch's dispatcher knows them."""
    key = _DISPATCH_KEYS.get(device.type)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in OPERATORS if key is None or not has_kernel(f"resnet_fused::{name}", key)]


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
        from . import __version__

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
        "fused": served_by == "compiled",
        "reason": reason,
    }


def _library(name: str) -> dict[str, Any]:
    path = library.path(name)
    loaded = str(path) in torch.ops.loaded_libraries
    state = "loaded" if loaded else "not loaded" if path.is_file() else "not built"
    reason = None if loaded else library.why_no_cuda() if name == "_cuda" else None
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
