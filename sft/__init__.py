"""Supervised stages before GRPO: gold answers at every budget, alignment, pretraining of compressors.

- `supervised` (gold completions), `contrastive` (slides and reports), `mae` (masked patches).
- `running`: one stage of a recipe after another; `options`: what each takes.
"""
