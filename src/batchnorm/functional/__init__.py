"""The functions: argument checks and the autograd seam; no state."""

from batchnorm.functional.batch_norm import batch_norm as batch_norm
from batchnorm.functional.batch_norm import run as run
from batchnorm.functional.checks import OnSmallBatch as OnSmallBatch
from batchnorm.functional.checks import check_ghost_size as check_ghost_size
from batchnorm.functional.checks import check_on_small_batch as check_on_small_batch
from batchnorm.functional.renorm import Renorm as Renorm
from batchnorm.functional.running import State as State
from batchnorm.functional.running import Tracked as Tracked
from batchnorm.functional.running import follow as follow
from batchnorm.functional.running import is_recomputed as is_recomputed
from batchnorm.functional.running import refuse_recomputation as refuse_recomputation
from batchnorm.functional.running import update_running as update_running
from batchnorm.functional.surroundings import in_backward as in_backward
from batchnorm.functional.surroundings import traced as traced
from batchnorm.functional.synchronized import Synchronized as Synchronized
from batchnorm.functional.synchronized import agree as agree
from batchnorm.functional.synchronized import synchronized as synchronized
from batchnorm.kernels.plain import Plain as Plain
