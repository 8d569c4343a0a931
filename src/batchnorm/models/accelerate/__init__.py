"""Running the batch norms of any model fused with what follows them."""

from batchnorm.models.accelerate.accelerate import FusionReport as FusionReport
from batchnorm.models.accelerate.accelerate import accelerate as accelerate
from batchnorm.models.accelerate.accelerate import explain as explain
