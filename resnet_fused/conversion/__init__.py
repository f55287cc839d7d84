"""Puts the fused operators into models that exist, takes them out again, and says what was done."""

from .convert import fuse, unfuse
from .report import FusionReport, fusion_report
from .verification import VerificationError

__all__ = ["FusionReport", "VerificationError", "fuse", "fusion_report", "unfuse"]
