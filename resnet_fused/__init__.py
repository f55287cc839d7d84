"""Fused BatchNorm, residual add and ReLU for residual networks."""

from . import functional, ops
from .ops.backend import backend

__version__ = "0.1.0"
__all__ = ["backend", "functional", "ops"]
