"""Fused BatchNorm, residual add and ReLU for residual networks."""

from . import functional, ops
from .conversion import FusionReport, VerificationError, fuse, fusion_report, unfuse
from .modules import BatchNormAddReLU2d, FusedBottleneck, FusedResidualBlock
from .ops.backend import backend
from .ops.decompositions import decompositions
from .ops.recomputation import recompute

__version__ = "0.1.0"
__all__ = [
    "BatchNormAddReLU2d",
    "FusedBottleneck",
    "FusedResidualBlock",
    "FusionReport",
    "VerificationError",
    "backend",
    "decompositions",
    "functional",
    "fuse",
    "fusion_report",
    "ops",
    "recompute",
    "unfuse",
]
