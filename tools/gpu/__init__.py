"""The steps of ``tools/gpu_check.py``, a process each (``python -m gpu.values``), and what they share."""

import pathlib
import sys

# The tests' oracle and mends of Triton's interpreter, which are in no package.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "tests"))
