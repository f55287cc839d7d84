"""Which GPUs the code of a CUDA library runs on."""

import re

_ENTRY = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a library built for ``architectures`` has code for a GPU.

    Machine code for 8.6 runs on 8.6 and what is newer of the same major number; that for 9.0a on 9.0 alone, that for
    10.0f on its major number. PTX runs on whatever is not older, except that of an ``a`` or ``f``, which is bound like
    its machine code.

    Args:
        architectures: as the library tells them, ``"7.5;8.0;12.0+PTX"``.
        capability: of the GPU, as ``torch.cuda.get_device_capability`` gives it.
    """
    return any(_entry_runs_on(entry, capability) for entry in architectures.split(";") if entry)


def _entry_runs_on(entry: str, capability: tuple[int, int]) -> bool:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        return False
    built_for = int(match[1]), int(match[2])
    if match[3] == "a":
        return capability == built_for
    if capability[0] == built_for[0] and capability[1] >= built_for[1]:
        return True
    return bool(match[4]) and not match[3] and capability >= built_for


def why_not_on(architectures: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability is not served; None where it is."""
    if runs_on(architectures, capability):
        return None
    number = ".".join(map(str, capability))
    return (
        f"the CUDA library has no code for compute capability {number}, only for {architectures.replace(';', ', ')}: "
        f"build it with TORCH_CUDA_ARCH_LIST={number}"
    )
