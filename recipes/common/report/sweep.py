"""The sweep over learning rates as a picture of a report."""

from __future__ import annotations

from ..training.find_rate import Sweep
from .figures import rates
from .page import Picture


def picture(sweep: Sweep) -> Picture:
    """The smoothed loss against the rate."""
    ends = f"from {sweep.rates[0]:.2g} to {sweep.rates[-1]:.2g}"
    return Picture(
        "Learning rate finder",
        rates(sweep.rates, sweep.losses, sweep.suggested),
        f"{sweep.told} A sweep on a copy of the model, a batch for each rate, the loss smoothed. The rate of the head "
        "rises alike. It says nothing of a longer run, or of what is redrawn.",
        f"Smoothed training loss over learning rates {ends}. {sweep.told}",
    )
