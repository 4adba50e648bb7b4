"""Learners and trainers are those of the joint stage."""

from tests.rl.conftest import make_learner, make_trainer, quick_collection

__all__ = ["make_learner", "make_trainer", "quick_collection"]
