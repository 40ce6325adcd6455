"""What operators cost: measured, modelled, and summed up to the actions of a stage."""

from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.base import CostModel
from muxtune.costs.compose import (
    MicrobatchWork,
    p2p_seconds,
    stage_operators,
    step_seconds,
)
from muxtune.costs.overhead import ActionOverhead, StageSum
from muxtune.costs.profile import Measurement, Profile, Provenance, load_profile, save_profile
from muxtune.costs.profiled import ExtrapolationWarning, ProfiledCosts
from muxtune.costs.roofline import RooflineCoefficients, RooflineCosts, fit_coefficients
from muxtune.costs.wrapped import WrappedCosts

__all__ = [
    "ActionOverhead",
    "AnalyticCosts",
    "CostModel",
    "ExtrapolationWarning",
    "Measurement",
    "MicrobatchWork",
    "Profile",
    "ProfiledCosts",
    "Provenance",
    "RooflineCoefficients",
    "RooflineCosts",
    "StageSum",
    "WrappedCosts",
    "fit_coefficients",
    "load_profile",
    "p2p_seconds",
    "save_profile",
    "stage_operators",
    "step_seconds",
]
