"""What running statistics know: shift, adaptation, and the health of batch norms."""

from batchnorm.diagnose.adapt import AdaptReport as AdaptReport
from batchnorm.diagnose.adapt import adapt as adapt
from batchnorm.diagnose.adapt import adapting as adapting
from batchnorm.diagnose.check import Finding as Finding
from batchnorm.diagnose.check import HealthReport as HealthReport
from batchnorm.diagnose.check import check as check
from batchnorm.diagnose.detector import ShiftDetector as ShiftDetector
from batchnorm.diagnose.monitor import Monitor as Monitor
from batchnorm.diagnose.shift import TOLERANCE as TOLERANCE
from batchnorm.diagnose.shift import ShiftReport as ShiftReport
from batchnorm.diagnose.shift import measure_shift as measure_shift
