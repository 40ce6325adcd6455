"""Discrete-event simulation of plans, and the search for the best one."""

from sim.costs import plan_costs
from sim.engine import simulate_schedule
from sim.report import SimulationReport
from sim.search import price_decisions, search_plan, search_problem
from sim.simulate import simulate_operators, simulate_plan

__all__ = [
    "SimulationReport",
    "plan_costs",
    "price_decisions",
    "search_plan",
    "search_problem",
    "simulate_operators",
    "simulate_plan",
    "simulate_schedule",
]
