"""The confidence interval of a mean over independent runs."""

import numpy as np


def interval(values) -> dict:
    """Returns the mean of independent runs and its 95% interval (Student's t; None for one run)."""
    from scipy.stats import t  # takes most of a second to import

    values = [float(value) for value in values]
    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
        low, high = float(mean - half), float(mean + half)
    return {"mean": mean, "low": low, "high": high, "seeds": len(values), "values": values}
