"""The functions: argument checks and the autograd seam; no state."""

from batchnorm.functional.batch_norm import batch_norm as batch_norm
from batchnorm.functional.checks import OnSmallBatch as OnSmallBatch
from batchnorm.functional.checks import check_on_small_batch as check_on_small_batch
