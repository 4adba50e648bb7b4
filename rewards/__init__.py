"""Rewards of completions, in TRL's form.

- `registry`: rewards by name, and functions of your own; `validate`: what a policy could earn without looking.
- `answer`, `label`, `detection`, `text`, `entities`, `synoptic`: what a completion says, and what it is worth.
- `shaping`, `cost`, `priced`, `objectives`: form, length, tokens, and what an allocator maximises.
"""
