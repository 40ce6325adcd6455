"""Discrete-event simulation of plans, and the search for the best one."""

from sim.engine import simulate_plan, simulate_schedule
from sim.report import SimulationReport
from sim.search import search_plan

__all__ = ["SimulationReport", "search_plan", "simulate_plan", "simulate_schedule"]
