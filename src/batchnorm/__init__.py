"""Batch normalization for PyTorch: the layer, the life of its statistics, the evidence.

import batchnorm as bn

layer = bn.BatchNorm2d(64, activation="relu")  # takes the place of torch.nn.BatchNorm2d + ReLU
"""

from batchnorm.conventions import from_flax, from_keras, to_flax, to_keras
from batchnorm.diagnose import (
    AdaptReport,
    Finding,
    HealthReport,
    Monitor,
    ShiftDetector,
    ShiftReport,
    adapt,
    adapting,
    check,
    measure_shift,
)
from batchnorm.functional import State, batch_norm
from batchnorm.kernels import backend, backends
from batchnorm.layers import (
    BankedBatchNorm,
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    SyncBatchNorm,
    domain,
)
from batchnorm.models import (
    accelerate,
    assert_statistics_agree,
    big_batch,
    calibrate,
    check_parity,
    convert,
    explain,
    fold,
    freeze,
    memory_report,
    merge_statistics,
    reduce_statistics,
    revert,
    synchronize,
    transaction,
    unfreeze,
    unsynchronize,
)
from batchnorm.moments import Moments

__version__ = "0.1.0"

__all__ = [
    "AdaptReport",
    "BankedBatchNorm",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "Finding",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "HealthReport",
    "Moments",
    "Monitor",
    "ShiftDetector",
    "ShiftReport",
    "State",
    "SyncBatchNorm",
    "accelerate",
    "adapt",
    "adapting",
    "assert_statistics_agree",
    "backend",
    "backends",
    "batch_norm",
    "big_batch",
    "calibrate",
    "check",
    "check_parity",
    "convert",
    "domain",
    "explain",
    "fold",
    "freeze",
    "from_flax",
    "from_keras",
    "measure_shift",
    "memory_report",
    "merge_statistics",
    "reduce_statistics",
    "revert",
    "synchronize",
    "to_flax",
    "to_keras",
    "transaction",
    "unfreeze",
    "unsynchronize",
]
