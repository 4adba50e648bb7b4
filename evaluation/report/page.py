"""Render the report as one self-contained page, `report.html`."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_rgb

from frugalpath.evaluation.report import figures
from frugalpath.evaluation.report.examples import Row, answers_of, gains, helps, ladder_of, mistakes, spread
from frugalpath.evaluation.report.pictures import Shown
from frugalpath.evaluation.report.tables import (
    figure,
    interval,
    label,
    measures,
    number,
    of_patients,
    synoptic_tables,
    unit,
)
from frugalpath.files import write_text

Pictured: TypeAlias = Callable[[str, int], Sequence[Shown]]

SHOWN = 6
"""Number of example cases of each kind."""
PROMPT = 240
"""Maximum length of a displayed question, in characters."""
STAGES = {
    "base": "base",
    "sft": "SFT",
    "sft_continued": "SFT continued",
    "grpo": "GRPO",
    "grpo_allocator": "GRPO + allocator",
}
GAINS = {
    "gain_over_sft": "GRPO over SFT",
    "gain_over_sft_continued": "GRPO over SFT continued",
    "gain_over_random": "allocator over random",
    "gain_over_text_only": "allocator over text only",
    "gain_over_majority": "allocator over majority answer",
}
CONTROLS = {
    "operating_point": "allocator",
    "operating_random": "random, same mean budget, no probe paid",
    "oracle": "oracle, cheapest correct budget",
    "text_only": "text only, no image",
    "majority": "majority answer",
}


def write_page(folder: str | Path, pictures: Pictured | None = None) -> Path:
    """Write `report.html` from the `summary.json` and `cases.jsonl` of a report's folder.

    Args:
        folder: the report's folder.
        pictures: makes the pictures of a case at a budget; without it, cases are shown as text only.
    """
    folder = Path(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    name = folder.absolute().parent.name
    if "transfer" in summary:
        name += f" applied to {Path(summary['transfer']['recipe']).stem}"
    path = folder / "report.html"
    write_text(path, render(summary, [json.loads(line) for line in lines], name, pictures))
    return path


class Axis(NamedTuple):
    """Accuracy range of the interval bars in a table."""

    low: float
    high: float

    @classmethod
    def of(cls, points: Iterable[dict[str, Any]]) -> Axis:
        """Smallest range of tenths that covers the intervals of some points."""
        ends = [end for point in points for end in (*point["ci95"], point["accuracy"])]
        return cls(math.floor(10 * min(ends)) / 10, math.floor(10 * max(ends) + 1) / 10)

    def at(self, accuracy: float) -> str:
        """Position along the axis, as a share."""
        return f"{(accuracy - self.low) / (self.high - self.low):.4f}"


def render(summary: dict[str, Any], rows: Sequence[Row], name: str, pictures: Pictured | None = None) -> str:
    """Render the page as HTML. Case ids are shown; patient ids and text of open answers are not.

    Args:
        summary, rows: content of `summary.json` and `cases.jsonl`; what a summary has not is left out of the page.
        name: of the run. pictures: see `write_page`.
    """
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "label": label, "interval": interval, "figure": figure}
    ladder, largest = ladder_of(rows), summary["static"][-1]["flops"]
    static = summary["headline"]["best_static_budget"]
    drawn = {
        "frontier": figures.frontier(summary),
        "small": [*figures.training(summary.get("training") or ()), *figures.reliability(summary)],
    }
    placed, attribution = points(summary), summary.get("attribution") or {}
    controls = [(title, summary[key]) for key, title in CONTROLS.items() if key in summary]
    context = {
        "name": name,
        "summary": summary,
        "largest": largest,
        "headline": headline(summary),
        "tiles": tiles(summary),
        "points": placed,
        "points_axis": Axis.of(row["point"] for row in placed),
        "prefix": command_prefix([row["command"] for row in placed if row["command"]]),
        "ladder": ladder,
        "colors": colors(len(ladder)),
        "spread": spread(rows, ladder),
        "helps": helps(rows, ladder),
        "spend": (summary.get("calibration") or {}).get("spend"),
        "measures": measures(summary),
        "examples": {
            "gains": [_example(row, ladder, pictures) for row in gains(rows, ladder, static, SHOWN)],
            "mistakes": [_example(row, ladder, pictures) for row in mistakes(rows, ladder, SHOWN)],
        },
        "attribution": [(STAGES.get(key, key), at_budget(point), point) for key, point in attribution.items()],
        "gains": [(title, summary["headline"][key]) for key, title in GAINS.items() if key in summary["headline"]],
        "controls": controls,
        "stages_axis": Axis.of([*attribution.values(), *(point for _, point in controls)]),
        "probe": summary.get("linear_probe") or {},
        "by_question": summary.get("by_question") or {},
        "synoptic": synoptic_tables(summary.get("synoptic") or {}, STAGES),
        "warnings": summary.get("warnings") or [],
        "missing": summary.get("missing_slides") or [],
        "command": summary.get("command"),
        "environment": environment_of(summary),
        "unit": unit(summary),
        "figures": drawn,
        "style": Markup((here / "page.css").read_text(encoding="utf-8")),
        "script": Markup((here / "page.js").read_text(encoding="utf-8")),
        # plotly.js-basic-dist-min 4.1.1: the full bundle takes a browser a second longer to read.
        "plotly": Markup((here / "plotly" / "plotly-basic.min.js").read_text(encoding="utf-8")),
    }
    return environment.get_template("page.html.j2").render(context)


def headline(summary: dict[str, Any]) -> dict[str, str]:
    """Summarize the result in words: `title`, and `text` with the comparisons."""
    head, own, random = summary["headline"], summary["operating_point"], summary["operating_random"]
    share = own["flops"] / summary["static"][-1]["flops"]
    lost = head["accuracy_lost"]
    best = f"the best static budget, {head['best_static_budget']} tokens"
    text = f"That is {_beside(lost, -1)} {best}{_ends(lost, -1)}. "
    dealt = random["flops"] / summary["static"][-1]["flops"]
    text += "A random allocator with the same mean budget, which pays for no probe, reaches "
    text += f"{random['accuracy']:.3f} at {dealt:.0%} of the largest budget's cost".replace("%", " %")
    if "gain_over_random" in head:
        gain = head["gain_over_random"]
        text += f"; this one is {_beside(gain, 1)} it{_ends(gain, 1)}"
    low, high = own["ci95"]
    title = f"{share:.0%} of the cost of the largest budget, at accuracy {own['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    return {"title": title.replace("%", " %"), "text": text + "."}


def _beside(difference: dict[str, Any], sign: int) -> str:
    """Phrase a difference as points above or below."""
    points = round(100 * sign * difference["value"], 1)
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}" if points else "level with"


def _ends(difference: dict[str, Any], sign: int) -> str:
    """Format the 95 % interval of a difference, in points."""
    low, high = sorted(100 * sign * end + 0.0 for end in difference["ci95"])
    return f" [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Figures under the headline, each with name, value and remark."""
    head, own, largest = summary["headline"], summary["operating_point"], summary["static"][-1]
    equal = head.get("cost_saved_vs_static")
    rival = "no static budget is as accurate" if equal is None else "of the cheapest equally accurate static budget"
    found = [
        ("Test cases", f"{summary['n']:,}".replace(",", " "), of_patients(summary).strip("()")),
        (
            "Visual tokens",
            f"{own['tokens']:.1f}",
            f"per case on average; the largest budget takes {round(largest['tokens'], 1):g}",
        ),
        ("Cost at equal accuracy", "—" if equal is None else f"{1 - equal:.0%}".replace("%", " %"), rival),
    ]
    if own.get("latency_ms"):
        remark = f"per answer at batch size 1; the largest budget takes {largest['latency_ms']:.1f} ms"
        found.append(("Latency", f"{own['latency_ms']:.1f} ms", remark))
    return found


def points(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of operating points; `command` is None where the summary has none."""
    largest, price = summary["static"][-1]["flops"], summary["headline"]["price"]
    curve = list(summary["allocator"])
    if price not in [p["price"] for p in curve]:
        curve = sorted([*curve, summary["operating_point"]], key=lambda p: p["price"])
    rows = []
    for kind, members in (("static", summary["static"]), ("allocator", curve)):
        key = "budget" if kind == "static" else "price"
        commands = {row[key]: row["command"] for row in summary.get("reproduce") or () if key in row}
        for point in members:
            at = point[key]
            rows.append(
                {
                    "name": f"static, {at}" if kind == "static" else f"λ = {at:g}",
                    "kind": kind,
                    "own": kind == "allocator" and at == price,
                    "point": point,
                    "share": point["flops"] / largest,
                    "command": commands.get(at),
                }
            )
    return rows


def command_prefix(commands: Sequence[str]) -> str:
    """Common first words of all commands."""
    words = zip(*(command.split(" ") for command in commands), strict=False)
    return "".join(f"{first} " for first, *rest in takewhile(lambda column: len(set(column)) == 1, words) if rest)


def at_budget(point: dict[str, Any]) -> str:
    """Budget of a stage in the attribution."""
    return f"{point['budget']} tokens" if "budget" in point else f"λ = {point['price']:g}"


def colors(n: int) -> list[tuple[str, str]]:
    """Background and text colour of each budget."""
    found = []
    for color in figures.budget_colors(n):
        red, green, blue = to_rgb(color)
        found.append((color, figures.INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"))
    return found


def environment_of(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Settings and versions of the run, as names and values."""
    found = [(key, number(summary[key])) for key in ("git", "seed") if summary.get(key) is not None]
    found += [(f"weight of {name} in the score", number(w)) for name, w in (summary.get("scored_by") or {}).items()]
    found += [(f"{name} cases", number(n)) for name, n in (summary.get("splits") or {}).items()]
    found += [(f"seconds of {label(name)}", number(s)) for name, s in (summary.get("seconds") or {}).items()]
    return found + list((summary.get("versions") or {}).items())


def _example(row: Row, ladder: Sequence[int], pictures: Pictured | None) -> Row:
    """A case as shown on the page."""
    gold, answer = answers_of(row)
    prompt = row.get("prompt", "") if row.get("task") in ("choice", "detection") else ""
    shown = pictures(row["id"], row["budget"]) if pictures else ()
    return {
        **{k: row[k] for k in ("id", "question", "budget", "tokens", "score")},
        "prompt": prompt if len(prompt) <= PROMPT else prompt[:PROMPT].rstrip() + " …",
        "gold": gold,
        "answer": answer,
        "scores": [(b, row["score_by_budget"][str(b)]) for b in ladder],
        "pictures": [
            {"name": s.name, "full": _uri(s.full), "seen": _uri(s.seen), "tokens": s.tokens, "note": s.note}
            for s in shown
        ],
    }


def _uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
