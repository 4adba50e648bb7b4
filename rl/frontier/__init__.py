"""Accuracy against cost: points, and how one frontier compares with another. Pure functions of arrays."""

from rl.frontier.points import Point, chosen, mixed, oracle_rungs, pick_price, point

__all__ = ["Point", "chosen", "mixed", "oracle_rungs", "pick_price", "point"]
