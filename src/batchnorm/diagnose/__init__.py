"""What running statistics know: shift, adaptation, and the health of batch norms."""

from batchnorm.diagnose.adapt import AdaptReport as AdaptReport
from batchnorm.diagnose.adapt import adapt as adapt
from batchnorm.diagnose.adapting import adapting as adapting
from batchnorm.diagnose.check import Finding as Finding
from batchnorm.diagnose.check import HealthReport as HealthReport
from batchnorm.diagnose.check import check as check
from batchnorm.diagnose.detector import ShiftDetector as ShiftDetector
from batchnorm.diagnose.look import TOLERANCE as TOLERANCE
from batchnorm.diagnose.monitor import Monitor as Monitor
from batchnorm.diagnose.shift import measure_shift as measure_shift
from batchnorm.diagnose.shift_report import ShiftReport as ShiftReport
