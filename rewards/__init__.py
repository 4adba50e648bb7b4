"""Rewards of completions, in TRL's form.

- `registry`: rewards by name, and your own functions; `validate`: what a policy could earn without the image.
- `answer`, `label`, `detection`, `text`, `entities`, `synoptic`: reading and scoring answers.
- `shaping`, `cost`, `priced`, `objectives`: form, length, tokens, and what an allocator maximises.
"""
