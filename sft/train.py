"""Run only the supervised stages of a recipe's `sft`, which `frugalpath grpo` continues from.

    accelerate launch sft/train.py --config configs/recipes/<x>.yaml [--set sft.max_steps=500 ...]

Writes the performer to `sft/` of the recipe's `output_dir`, stages before the last to `sft_<stage>/`, and prints its
score on the validation cases at every budget. Finished stages are skipped; an interrupted one resumes from its last
complete checkpoint.
"""

from __future__ import annotations

from frugalpath.allocator.score_table import RunTables
from frugalpath.distributed import is_main
from frugalpath.errors import InputError, entry
from frugalpath.recipe.cache_key import sft_key
from frugalpath.recipe.data import load_data
from frugalpath.recipe.run import parse_recipe
from frugalpath.sft.stages import warm_start


@entry
def main() -> None:
    """Run the stages."""
    run = parse_recipe()
    if run.performer.checkpoint and not run.sft:
        raise InputError(
            "sft: the recipe names performer.checkpoint and no `sft` keys, so nothing is trained; add some"
        )
    data = load_data(run)
    performer = warm_start(data)
    if run.sft and run.sft[-1].no_language_model:
        if is_main():
            print(f"written to {run.folder / 'sft'}; the language model is untrained and cannot answer questions yet")
        return
    table = RunTables(data, "sft", performer, sft_key(data), run.ladder)["val"]
    if is_main():
        for budget, score in zip(run.ladder, table.score.mean(0), strict=True):
            print(f"{budget:5d} tokens: {score:.3f} on {len(table.ids)} validation cases")
        print(f"written to {run.folder / 'sft'}")


if __name__ == "__main__":
    main()
