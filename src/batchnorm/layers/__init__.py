"""The layers: state and policy."""

from batchnorm.layers.banked import BankedBatchNorm as BankedBatchNorm
from batchnorm.layers.banked import domain as domain
from batchnorm.layers.batch_norm import BatchNorm as BatchNorm
from batchnorm.layers.batch_norm import BatchNorm1d as BatchNorm1d
from batchnorm.layers.batch_norm import BatchNorm2d as BatchNorm2d
from batchnorm.layers.batch_norm import BatchNorm3d as BatchNorm3d
from batchnorm.layers.frozen import FrozenBatchNorm as FrozenBatchNorm
from batchnorm.layers.ghost import GhostBatchNorm as GhostBatchNorm
from batchnorm.layers.ledger import Ledger as Ledger
from batchnorm.layers.renorm import BatchRenorm as BatchRenorm
from batchnorm.layers.sync import SyncBatchNorm as SyncBatchNorm
