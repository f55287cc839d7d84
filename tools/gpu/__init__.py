"""The steps of ``tools/gpu_check.py``, a process each (``python -m gpu.values``), and what they share."""
