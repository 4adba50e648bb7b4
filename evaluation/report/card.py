"""The model card of a finished run: data, results with intervals, controls, limits, environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from frugalpath.evaluation.report.examples import example_arguments
from frugalpath.evaluation.report.tables import of_patients, unit
from frugalpath.files import write_text
from frugalpath.recipe.run import Run

TEMPLATE = Path(__file__).with_name("card.md.j2")
DIFFERENCES = {
    "gain_over_sft": "over the supervised stage",
    "gain_over_sft_continued": "over the supervised stage continued for the same compute",
    "gain_over_random": "over the same budgets assigned at random",
    "gain_over_text_only": "over no image",
    "gain_over_majority": "over the commonest answer",
    "accuracy_lost": "lost against the best fixed budget on validation cases",
}
"""Keys of the headline, with what the operating point is compared to."""
OF_RUN = """    frugalpath answer --config RECIPE {example}
    frugalpath publish --config RECIPE --to FOLDER"""
"""Commands that use a run's folder."""


@dataclass(frozen=True)
class About:
    """Facts for the card that the run does not hold.

    Args:
        title: title of the card.
        data: name of the data; None takes the recipe's.
        data_license: license of the data.
        license: license of the model, as a Hub identifier.
    """

    title: str | None = None
    data: str | None = None
    data_license: str | None = None
    license: str | None = None


def write_card(
    path: Path,
    run: Run,
    summary: Mapping[str, Any],
    about: About = About(),
    base: str | None = None,
    use: str | None = None,
) -> None:
    """Write the model card.

    Args:
        summary: of the run's report. base: name of the model that training began with. use: how it is asked,
            Markdown; by default how the run's own folder is.
    """
    title = about.title or f"FrugalPath {(run.path.stem if run.path else run.folder.name).replace('_', ' ')}"
    name = about.data or data_name(run)
    point = summary["operating_point"]
    result = EvalResult(
        task_type="visual-question-answering",
        dataset_type=name.lower().replace(" ", "-"),
        dataset_name=name,
        dataset_split="test",
        metric_type="accuracy",
        metric_name="mean score at the operating price",
        metric_value=round(point["accuracy"], 4),
    )
    data = ModelCardData(
        license=about.license,
        base_model=base,
        library_name="frugalpath",
        pipeline_tag="visual-question-answering",
        tags=["pathology", "medical", "vision-language-model", "reinforcement-learning", "grpo", "token-budget"],
        model_name=title,
        eval_results=[result],
    )
    rows = [(f"budget {p['budget']}", p) for p in summary["static"]]
    rows += [
        (f"**allocator, price {summary['headline']['price']:g}**", point),
        ("random, same mean budget", summary["operating_random"]),
    ]
    rows += [("no image", summary["text_only"]), ("commonest answer", summary["majority"])]
    stages = {
        k: f"stage {k.replace('_', ' ')}, its best budget" for k in summary["attribution"] if k != "grpo_allocator"
    }
    rows += [(name, summary["attribution"][key]) for key, name in stages.items()]
    head = summary["headline"]
    told = [(text, head[key]) for key, text in DIFFERENCES.items() if key in head and head[key]["value"] is not None]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        kind="Qwen2.5-VL" if run.performer.family == "qwen_vl" else "slide language model",
        base=base,
        data={"name": name, "license": about.data_license},
        summary=summary,
        patients=of_patients(summary),
        unit=unit(summary),
        counted="patients" in summary and unit(summary) == "patient",
        rows=rows,
        largest=summary["static"][-1]["flops"],
        differences=told,
        ladder=run.ladder,
        training=training(run),
        versions=", ".join(f"{k} {v}" for k, v in summary["versions"].items()),
        asked=(summary.get("asked") or {}).get("questions", []),
        use=OF_RUN.format(example=example_arguments(summary)) if use is None else use,
    )
    write_text(path, str(card).rstrip() + "\n")


def data_name(run: Run) -> str:
    """Name of the recipe's data: the environment, or the manifest's file."""
    source = run.cases.get("path") if run.cases["name"] == "manifest" else None
    return Path(source).stem if source else str(run.cases["name"]).rpartition(":")[2]


def training(run: Run) -> str:
    """Describe the training in a few sentences."""
    grpo, kinds = run.grpo, ", ".join(stage.kind.replace("_", " ") for stage in run.sft)
    own = f"LoRA {run.performer.lora}" if run.performer.lora is not None else "all weights"
    return (
        f"Supervised stages: {kinds or 'none'}. Then GRPO ({grpo.mode}, {grpo.loss_type}) of {own}: {grpo.max_steps} "
        f"steps, {grpo.num_generations} completions for each of {grpo.budgets_per_image} budgets per image, learning "
        f"rate {grpo.learning_rate:g}, beta {grpo.beta:g}. Budgets {run.ladder}; allocator of the form "
        f"`{run.allocator.form}`. Rewards: {', '.join(_named(r) for r in run.rewards)}."
    )


def _named(reward: Any) -> str:
    return f"{reward['name']} (weight {reward.get('weight', 1):g})" if isinstance(reward, dict) else str(reward)
