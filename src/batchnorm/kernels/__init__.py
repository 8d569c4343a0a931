"""The arithmetic of batch normalization: four steps, several backends, one dispatch point."""

from batchnorm.kernels.activations import Activation as Activation
from batchnorm.kernels.activations import ActivationLike as ActivationLike
from batchnorm.kernels.contract import Backend as Backend
from batchnorm.kernels.contract import Form as Form
from batchnorm.kernels.contract import Found as Found
from batchnorm.kernels.contract import Given as Given
from batchnorm.kernels.contract import Gradients as Gradients
from batchnorm.kernels.contract import Needs as Needs
from batchnorm.kernels.contract import Steps as Steps
from batchnorm.kernels.dispatch import DIFFERENTIABLE as DIFFERENTIABLE
from batchnorm.kernels.dispatch import are_there as are_there
from batchnorm.kernels.dispatch import backend as backend
from batchnorm.kernels.dispatch import backends as backends
from batchnorm.kernels.dispatch import choose as choose
