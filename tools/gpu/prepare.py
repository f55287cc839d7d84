"""Compiles, beside the untimed steps, what torch.compile needs in the timed ones: they find it in the cache."""

import importlib.util
import sys

from .step import attempt, begin


def main(arguments: list[str] | None = None) -> int:
    """Returns 0: what cannot be compiled fails where it is to be timed."""
    step = begin("prepare", arguments)
    from . import bandwidth

    attempt("bandwidth", lambda: bandwidth.prepare(step))
    if importlib.util.find_spec("torchvision"):
        from . import networks

        attempt("networks", lambda: networks.prepare(step))
    print(f"done with {step.left():.0f} s left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
