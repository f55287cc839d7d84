"""Puts the fused operators into models that exist, takes them out again, and says what was done."""

from .convert import fuse, unfuse
from .report import FusionReport, fusion_report

__all__ = ["FusionReport", "fuse", "fusion_report", "unfuse"]
