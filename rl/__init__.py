"""Training by reinforcement, evaluation, and the commands that users run.

- Commands: `grpo` (a whole run), `pareto` (the report again), `allocate`, `answer`, `compare`, `publish`, `doctor`.
- `trainer` (what TRL's GRPOTrainer does once instead of many times) and `joint` (performer and allocator in one step).
- `allocation` (how the allocator learns), `deciders` (its forms when deployed), `frontier` (accuracy against cost),
  `evaluation` (score tables, controls, intervals), `report` (the page).
- `recipe` (the configuration) and `stages` (what a run does, in order).
"""
