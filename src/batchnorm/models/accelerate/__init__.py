"""Running the batch norms of any model fused with what follows them."""

from batchnorm.models.accelerate.model import FusionReport as FusionReport
from batchnorm.models.accelerate.model import accelerate as accelerate
from batchnorm.models.accelerate.model import explain as explain
