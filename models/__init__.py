"""The performer, what it sees with, and the networks of the allocator.

- `performer` (prompts, budgets and answers), built from a recipe by `build`: `slide_vlm` over stored features,
  `qwen_vl`, `gemma_vl`; `slide_text` for retrieval.
- `sight` and its families (`visual`, `tower_sight`): images at a budget of tokens; `compressors` for slides.
- `attention` and `generation`: a prompt read once for many completions. `cost`: FLOPs of an answer.
- `allocators`: value, policy, text and split.
"""
