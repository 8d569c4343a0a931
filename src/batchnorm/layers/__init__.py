"""The layers: state and policy."""

from batchnorm.layers.batch_norm import BatchNorm as BatchNorm
from batchnorm.layers.batch_norm import BatchNorm1d as BatchNorm1d
from batchnorm.layers.batch_norm import BatchNorm2d as BatchNorm2d
from batchnorm.layers.batch_norm import BatchNorm3d as BatchNorm3d
