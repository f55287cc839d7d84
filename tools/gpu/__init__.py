"""The steps of ``tools/gpu_check.py``: a module each, run as a process (``python -m gpu.values``), and what they share."""
