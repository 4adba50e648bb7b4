"""Cases: images or slides with a question and its answer, by patient and split.

- `case`, and where cases come from: `manifest` (your own files), `simulator` (drawn slides with known truth), `mosaic`
  (labelled tiles laid out on a field).
- `checks`: leaks, copies and contradictions; `new_cases`: cases that are only answered.
- `score_table`: what a performer scores at every budget.
"""
