"""The report's page: from all of a summary and from the least of it, its escapes, and in a real browser."""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.browser import Browser, find_chromium
from benchmarks.report_page import LADDER, made_up, pictures, summary_of
from frugalpath.envs.case import Case
from frugalpath.evaluation.report.examples import OPEN, gains, helps, mistakes, spread
from frugalpath.evaluation.report.page import command_prefix, headline, render, write_page
from frugalpath.evaluation.report.pictures import EMPTY, MOST_BYTES, SIDE, Pictures, jpeg, mean_cells, read_whole
from frugalpath.evaluation.report.writing import write_outcome
from frugalpath.models.feature_bank import VisualTokens
from tests.slides.conftest import write_slide

LEAST = ("n", "n_patients", "static", "allocator", "random", "operating_point", "operating_random", "headline")
HOSTILE = "<script>alert('x')</script>"


class Elements(HTMLParser):
    """Tags of a page with their attributes, the text of its scripts, and all other text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.scripts = "", []
        self._script = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data

    def ids(self) -> set[str]:
        return {a["id"] for _, a in self.tags if "id" in a}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A report of 90 cases."""
    made = tmp_path_factory.mktemp("run") / "report"
    outcome = made_up(90)
    write_outcome(made, outcome, summary_of(outcome), pictures)
    return made


@pytest.fixture
def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_of_a_summary_is_told(folder, summary):
    page = Elements((folder / "report.html").read_text())
    sections = {"frontier", "points", "budgets", "measures", "cases", "training", "attribution", "questions", "run"}
    assert page.ids() >= sections
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert {link.removeprefix("#") for link in links} <= page.ids()
    copies = [a["data-copy"] for _, a in page.tags if "data-copy" in a]
    assert {row["command"] for row in summary["reproduce"]} | {summary["command"]} == set(copies)
    for text in (*summary["warnings"], "no tissue", summary["git"], "rank correlation", "Brier skill"):
        assert text.lower() in page.text.lower()
    own = summary["operating_point"]
    assert f"accuracy {own['accuracy']:.3f} [{own['ci95'][0]:.3f}, {own['ci95'][1]:.3f}]" in page.text
    assert [t for t, _ in page.tags].count("h1") == 1
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")


def test_patients_are_not_named(folder, rows):
    html = (folder / "report.html").read_text()
    assert rows[0]["patient"] == "patient0" and "patient0" not in html
    assert any(row["id"] in html for row in rows)


def test_the_least_of_a_summary_makes_a_page(summary, rows):
    least = {key: summary[key] for key in LEAST}
    least["headline"] = {k: summary["headline"][k] for k in ("price", "best_static_budget", "accuracy_lost")}
    kept = ("id", "patient", "question", "answer", "budget", "completion", "score", "tokens", "flops")
    page = Elements(render(least, [{k: r[k] for k in (*kept, "score_by_budget")} for r in rows], "run"))
    assert page.ids() >= {"frontier", "points", "budgets", "cases"}
    assert not page.ids() & {"measures", "training", "questions", "warnings"}
    assert OPEN in page.text  # nothing says that the answers may be shown


def test_nothing_is_loaded(folder):
    html = (folder / "report.html").read_text()
    page = Elements(html)
    assert "default-src 'none'" in html
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert re.match(r"(data:|#)", attributes.get(name) or "#"), (tag, attributes)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_text_is_escaped(summary, rows):
    hostile = copy.deepcopy(summary)
    hostile["warnings"] = hostile["missing_slides"][0]["reason"], hostile["command"] = [HOSTILE], HOSTILE
    hostile["missing_slides"][0]["reason"] = HOSTILE
    hostile["reproduce"] = [{**row, "command": f"a '{HOSTILE} {i}"} for i, row in enumerate(hostile["reproduce"])]
    hostile["by_question"] = {HOSTILE: next(iter(hostile["by_question"].values()))}
    for row in rows:
        row |= {k: HOSTILE + row[k] for k in ("id", "prompt", "answer", "question")}
        row["completion"] = f"<answer>{HOSTILE}</answer>"
    html = render(hostile, rows, HOSTILE, pictures)
    page, clean = Elements(html), Elements(render(summary, rows[:1], "run"))
    assert len(page.scripts) == len(clean.scripts) == 3
    assert page.text.count(HOSTILE) > 20
    assert HOSTILE not in html
    assert json.loads(page.scripts[0])["frontier"]["views"].keys() == {"flops", "tokens", "latency"}


def test_text_of_open_answers_is_not_shown(summary, rows):
    for row in rows:
        row |= {"task": "open", "answer": "Mrs. Smith has a carcinoma", "prompt": "History of Mrs. Smith?"}
        row["completion"] = "<answer>Mrs. Smith is well</answer>"
    page = Elements(render(summary, rows, "run"))
    assert "cases" in page.ids() and "Smith" not in page.text + str(page.tags)


def test_the_page_can_be_made_again_from_its_files(folder, tmp_path):
    for name in ("summary.json", "cases.jsonl"):
        (tmp_path / name).write_text((folder / name).read_text())
    page = Elements(write_page(tmp_path).read_text())
    assert "cases" in page.ids() and not [tag for tag, _ in page.tags if tag == "img"]


def test_the_headline_says_which_side_it_is_on(summary):
    head = summary["headline"]
    head["accuracy_lost"] = {"value": 0.0123, "ci95": [-0.004, 0.03]}
    head["gain_over_random"] = {"value": 0.031, "ci95": [0.01, 0.05]}
    summary["operating_point"] |= {"flops": 0.25 * summary["static"][-1]["flops"]}
    summary["operating_random"] |= {"flops": 0.125 * summary["static"][-1]["flops"], "accuracy": 0.8}
    told = headline(summary)
    assert told["title"].startswith("25 % of the cost of the largest budget")
    assert "1.2 points below the best static budget, 256 tokens [−3.0, +0.4]." in told["text"]
    assert "same mean budget, which pays for no probe, reaches 0.800 at 12 % of the largest budget's" in told["text"]
    assert "3.1 points above it [+1.0, +5.0]." in told["text"]
    head["accuracy_lost"] = {"value": -0.01, "ci95": [-0.02, 0.0]}
    assert "1.0 points above the best static budget" in headline(summary)["text"]
    head["accuracy_lost"] = {"value": 0.0, "ci95": [0.0, 0.0]}
    assert "That is level with the best static budget" in headline(summary)["text"]


def test_commands_are_told_by_what_differs():
    assert command_prefix(["python a.py --budget 4", "python a.py --budget 16"]) == "python a.py --budget "
    assert command_prefix(["python a.py --budget 4", "python a.py --price 0.1"]) == "python a.py "
    assert command_prefix([]) == ""


def planted(name: str, budget: int, scores: tuple[float, ...], **keys) -> dict:
    by_budget = {str(b): s for b, s in zip((0, *LADDER), (0.0, *scores), strict=True)}
    row = {"id": name, "question": "q", "answer": "a", "task": "choice", "budget": budget, "tokens": budget}
    return {**row, "flops": float(budget), "score": by_budget[str(budget)], "score_by_budget": by_budget, **keys}


def test_gains_and_mistakes_are_those_planted():
    rows = [
        planted("saved", 1, (1, 1, 1, 1, 1)),
        planted("largest wrong", 4, (0, 1, 1, 1, 0)),
        planted("static wrong", 16, (0, 0, 1, 0, 1)),
        planted("nothing saved", 256, (0, 0, 0, 0, 1)),
        planted("wrong", 4, (0, 0, 0, 0, 1), predicted={"4": 0.2}),
        planted("surely wrong", 4, (0, 0, 0, 0, 1), predicted={"4": 0.9}),
        planted("hopeless", 4, (0, 0, 0, 0, 0)),
    ]
    assert [r["id"] for r in gains(rows, LADDER, 64, 9)] == ["largest wrong", "static wrong", "saved"]
    assert [r["id"] for r in mistakes(rows, LADDER, 9)] == ["surely wrong", "wrong"]
    other = [planted(f"other{i}", 4, (0, 1, 1, 1, 0), question="z") for i in range(5)]
    assert [r["question"] for r in gains(rows + other, LADDER, 64, 4)] == ["q", "z", "q", "z"]


def test_spread_and_helps_count_the_cases(rows):
    made = spread(rows, LADDER)
    assert made[0]["n"] == len(rows) and all(sum(row["shares"]) == pytest.approx(1) for row in made)
    assert sum(row["n"] for row in made if row["level"] == 2) == len(rows)
    assert sum(row["n"] for row in made if row["level"] == 3) == len(rows)
    assert sum(row["n"] for row in helps(rows, LADDER)) == len(rows)


def test_cells_are_averaged_and_the_rest_is_grey():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20, :40] = 100
    pixels[:20, :20] = 200
    # Squares of 20 px around the colours' border and elsewhere.
    seen = mean_cells(pixels, np.array([[20 / 80, 10 / 40, 20 / 80], [60 / 80, 30 / 40, 20 / 80]]))
    assert (seen[:20, 10:30] == 150).all() and (seen[20:, 50:70] == 0).all()
    assert (seen == EMPTY).all(-1).sum() == 40 * 80 - 2 * 400


def test_cells_of_a_grid_leave_no_seam(make_bank, cases):
    from tests.conftest import grid_features

    tokens = make_bank({"a": grid_features(6, 9)}).see("a", 6)
    seen = mean_cells(np.full((240, 360, 3), 7, np.uint8), tokens.rows[:, -4:-1].numpy())
    assert (seen == 7).all()


def test_pictures_of_a_field_and_of_a_slide(tmp_path, make_performer, monkeypatch):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (500, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "field.png")
    slide = write_slide(tmp_path / "slide.tif", rng.integers(0, 255, (1024, 512, 3), dtype=np.uint8))
    case = Case("c", "p", "choice", "?", "a", images=(str(tmp_path / "field.png"),), slides=(str(slide), "gone.svs"))
    performer = make_performer()
    place = [[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]
    features = np.concatenate([np.zeros((2, 8)), place], 1)

    def see(case, budget):
        import torch

        sources = (*case.images, *case.slides)
        return [VisualTokens(torch.tensor(features), budget, s, slide=i) for i, s in enumerate(sources)]

    monkeypatch.setattr(performer, "see", see)
    field, whole = Pictures(performer, [case])("c", 4)
    assert (field.name, whole.name, field.tokens) == ("image 1", "slide 2", 2)
    sizes = [Image.open(io.BytesIO(data)).size for data in (field.full, field.seen, whole.full, whole.seen)]
    assert sizes[0] == sizes[1] == (SIDE, round(SIDE * 500 / 700))
    assert sizes[2] == sizes[3] == (SIDE // 2, SIDE)
    assert max(len(p) for s in (field, whole) for p in (s.full, s.seen)) <= MOST_BYTES
    assert read_whole("features.h5", slide=True) is None and read_whole("gone.png", slide=False) is None


def test_pictures_of_a_resized_image(image_cases, qwen):
    shown = Pictures(qwen, image_cases)("case0", 4)
    assert [s.tokens for s in shown] == [4] and "56 × 56 px" in shown[0].note
    assert Image.open(io.BytesIO(shown[0].seen)).size == (56, 56)


def test_a_picture_keeps_to_its_size():
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    assert len(jpeg(noise, most=5000)) <= 5000


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(tmp_path):
    outcome = made_up(5000)
    write_outcome(tmp_path, outcome, summary_of(outcome), pictures)
    page = tmp_path / "report.html"
    with Browser(str(find_chromium())) as browser:
        for width, height in ((1280, 900), (390, 844)):
            browser.open(page, width, height)
            assert browser.evaluate(
                "document.querySelectorAll('#figure-frontier .main-svg .scatterlayer .trace').length"
            )
            assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
            unseen = "document.querySelectorAll('.plot:not(.js-plotly-plot)').length"
            assert browser.evaluate(unseen) > 0  # figures further down wait
            browser.evaluate("dispatchEvent(new Event('beforeprint'))")
            assert browser.evaluate(unseen) == 0
            assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
            axis = "document.querySelector('#figure-frontier .xtitle').textContent"
            assert "FLOPs" in browser.evaluate(axis)
            browser.evaluate("document.querySelector('input[value=latency]').click()")
            assert "milliseconds" in browser.evaluate(axis)
            browser.evaluate("document.querySelector('input[value=linear]').click()")
            assert browser.evaluate("document.getElementById('figure-frontier').layout.xaxis.type") == "linear"
            assert browser.errors() == []
            assert browser.requests() == [page.as_uri()]
        browser.evaluate("document.querySelector('.copy').click()")
        assert browser.evaluate(
            "new Promise(r => setTimeout(() => r(document.querySelector('.status').textContent), 99))"
        )
