"""The four steps in Triton: the backend for GPUs."""

from batchnorm.kernels.triton.backend import Triton as Triton
from batchnorm.kernels.triton.device import takes as takes
from batchnorm.kernels.triton.running import follow as follow
