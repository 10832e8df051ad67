from .calibration import measure_rule as measure_rule
from .monitor import Monitor as Monitor
from .overoptimisation import Verdict as Verdict
from .overoptimisation import verdict as verdict
from .stopping import parse_stop_rule as parse_stop_rule
