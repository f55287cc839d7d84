"""What becomes of a BatchNorm: the words that the report and fuse() share."""

from typing import NamedTuple

BATCH_NORM = "batch_norm"
BATCH_NORM_RELU = "batch_norm+relu"
BATCH_NORM_ADD_RELU = "batch_norm+add+relu"
DUAL_BATCH_NORM_ADD_RELU = "batch_norm+batch_norm+add+relu"


class Verdict(NamedTuple):
    """What becomes of one call of a BatchNorm.

    Attributes:
        operator: the operator it runs in, one of the above; None where it is called by itself.
        reason: why it is not part of an operator, or runs in one by itself; None where it is fused.
        recompute: whether that operator runs inside :class:`resnet_fused.recompute`.
    """

    operator: str | None
    reason: str | None
    recompute: bool | str = False
