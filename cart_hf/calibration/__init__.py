"""Statistics of the models on unlabelled examples of their own tasks: what `regmean` and `fisher` weigh them by."""

from cart_hf.calibration.run import calibrate
from cart_hf.calibration.statistics import Statistics

__all__ = ["Statistics", "calibrate"]
