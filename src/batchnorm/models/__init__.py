"""Tools for whole models: what happens to the statistics of all their layers."""

from batchnorm.models.accelerate import accelerate as accelerate
from batchnorm.models.accelerate import explain as explain
from batchnorm.models.big_batch import big_batch as big_batch
from batchnorm.models.calibrate import calibrate as calibrate
from batchnorm.models.convert import convert as convert
from batchnorm.models.convert import revert as revert
from batchnorm.models.fold import fold as fold
from batchnorm.models.freeze import freeze as freeze
from batchnorm.models.freeze import unfreeze as unfreeze
from batchnorm.models.memory import memory_report as memory_report
from batchnorm.models.parity import check_parity as check_parity
from batchnorm.models.statistics import assert_statistics_agree as assert_statistics_agree
from batchnorm.models.statistics import merge_statistics as merge_statistics
from batchnorm.models.statistics import reduce_statistics as reduce_statistics
from batchnorm.models.synchronize import synchronize as synchronize
from batchnorm.models.synchronize import unsynchronize as unsynchronize
from batchnorm.models.transaction import transaction as transaction
