from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from frugalpath.errors import InputError
from frugalpath.recipe.cache_key import grpo_key
from frugalpath.recipe.run import AllocatorOptions, parse_recipe
from frugalpath.recipe.sft import Stage
from frugalpath.rl.pipeline import check_answers

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe with changes and gives the arguments that name it."""

    def write(**changes) -> list[str]:
        content = {
            "output_dir": str(tmp_path / "run"),
            "cases": {"name": "simulator", "slides": 10},
            "ladder": [1, 4, 16],
            "num_generations": 4,
            "budgets_per_image": 2,
            "per_device_train_batch_size": 8,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        return ["--config", str(path)]

    return write


def problems(argv: list[str]) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_recipe(argv)
    return caught.value.problems


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_of_the_project_is_valid(path):
    run = parse_recipe(["--config", str(path)])
    assert run.path == path and run.base == path.parent
    assert run.cases["name"]
    assert set(run.allocator.look) <= set(run.ladder)


def test_there_are_recipes():
    assert RECIPES


def test_a_recipe_is_read_into_its_parts(recipe):
    run = parse_recipe(
        recipe(
            encoder={"mpp": 1.0},
            performer={"layers": 2},
            allocator={"price": 0.2},
            evaluation={"bootstrap": 10},
            learning_rate=3e-4,
            sft={"max_steps": 5},
        )
    )
    assert (run.encoder.mpp, run.performer.layers, run.allocator.price, run.evaluation.bootstrap) == (1.0, 2, 0.2, 10)
    assert run.grpo.learning_rate == 3e-4 and run.grpo.budgets_per_image == 2
    assert run.sft == [Stage("warm_start", "sft", {"max_steps": 5})] and run.ladder == [1, 4, 16]
    assert run.folder.name == "run"


def test_an_unknown_key_is_named_with_the_nearest(recipe):
    argv = recipe(lader=[1, 2], zzzzqqq=1)
    assert problems(argv) == [
        f"{argv[1]}: unknown key 'lader'; did you mean 'ladder'?",
        f"{argv[1]}: unknown key 'zzzzqqq'; remove it",
    ]


@pytest.mark.parametrize(
    ("section", "key", "near"),
    [
        ("encoder", "mp", "mpp"),
        ("performer", "layer", "layers"),
        ("allocator", "prise", "price"),
        ("evaluation", "tolerence", "tolerance"),
    ],
)
def test_an_unknown_nested_key_is_named_with_the_nearest(recipe, section, key, near):
    assert problems(recipe(**{section: {key: 1}})) == [f"{section}: unknown key {key!r}; did you mean {near!r}?"]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("performer", "compressors", "keep", "performer.compressors: expected a list, got 'keep'"),
        ("performer", "cross_layers", ["a"], "performer.cross_layers: expected a list of integers or null, got ['a']"),
        ("performer", "hidden", 8.0, "performer.hidden: expected an integer, got 8.0"),
        ("encoder", "qc", True, "encoder: unknown key 'qc'; remove it"),
        ("allocator", "look", 1, "allocator.look: expected a list of integers, got 1"),
        ("allocator", "price", "1e-1x", "allocator.price: expected a number, got '1e-1x'"),
        (
            "allocator",
            "fit_epochs",
            "1e1",
            "allocator.fit_epochs: expected an integer, got '1e1'; write a whole number",
        ),
        ("evaluation", "linear_probe", 0, "evaluation.linear_probe: expected true or false, got 0"),
    ],
)
def test_a_value_of_another_type_is_named(recipe, section, key, value, message):
    assert problems(recipe(**{section: {key: value}})) == [message]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", "many", "learning_rate: expected a number, got 'many'"),
        ("max_steps", 4.5, "max_steps: expected an integer, got 4.5"),
        ("max_steps", "1e1x", "max_steps: expected an integer, got '1e1x'"),
        ("max_steps", "1e1", "max_steps: expected an integer, got '1e1'; write a whole number"),
        ("num_generations", [4], "num_generations: expected an integer or null, got [4]"),
        ("gold_rollout", 3, "gold_rollout: expected true or false, got 3"),
        ("balance", "often", "balance: expected true or false, got 'often'"),
        ("rewards", "choice", "rewards: expected a list, got 'choice'"),
    ],
)
def test_a_value_of_another_type_is_named_at_the_top_level(recipe, key, value, message):
    argv = recipe(**{key: value})
    assert problems(argv) == [f"{argv[1]}: {message}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_epochs": "many"}, "sft.num_train_epochs: expected a number, got 'many'"),
        ({"max_steps": 4.5}, "sft.max_steps: expected an integer, got 4.5"),
        ({"bf16": "false"}, "sft.bf16: expected true, false or null, got 'false'"),
        ({"text_only": "some"}, "sft.text_only: expected a number, got 'some'"),
        ([{"stage": "mae", "learning_rate": True}, {}], "sft.mae.learning_rate: expected a number, got True"),
        ([{"stage": "mae", "share": "half"}, {}], "sft.mae.share: expected a number, got 'half'"),
        (
            {"stage": "case", "learning_rates": {"seeing": "fast"}},
            "sft.learning_rates: expected a mapping of names to numbers or null, got {'seeing': 'fast'}",
        ),
    ],
)
def test_a_value_of_another_type_is_named_in_every_stage(recipe, options, message):
    assert problems(recipe(sft=options)) == [message]


def test_a_number_that_yaml_reads_as_text_is_taken_for_it(recipe):
    assert yaml.safe_load("5e-4") == "5e-4"
    stages = [{"stage": "mae", "learning_rate": "1e-4"}, {"stage": "case", "learning_rates": {"seeing": "5e-4"}}]
    allocator = {"price": "1e-1", "price_range": ["3e-3", 1.0], "target": None}
    run = parse_recipe([*recipe(sft=stages, allocator=allocator, learning_rate="2e-5", min_p="1e-1"), "--set",
                        "sft.case.weight_decay=1e-2"])  # fmt: skip
    assert run.sft[0].options == {"learning_rate": 1e-4}
    assert run.sft[1].options == {"learning_rates": {"seeing": 5e-4}, "weight_decay": 1e-2}
    assert (run.allocator.price, run.allocator.price_range) == (0.1, [0.003, 1.0])
    assert (run.grpo.learning_rate, run.grpo.min_p) == (2e-5, 0.1)
    assert problems(recipe(learning_rate="1e999"))[0].endswith("expected a number, got '1e999'")


def test_what_is_wrong_at_all_levels_is_told_together(recipe):
    argv = recipe(
        lader=[1, 2],
        max_steps=4.5,
        ladder=[4, 1],
        performer={"hidden": 8.0, "layer": 2},
        sft=[{"stage": "mae", "max_steps": "x"}, {"learning_rate": "y"}],
        evaluation={"operating": "best"},
    )
    found = problems([*argv, "--set", "cases", "--lerning_rate", "1"])
    starts = [
        f"{argv[1]}: unknown key 'lader'",
        f"{argv[1]}: max_steps: expected",
        "command line: unknown argument --lerning_rate; did you mean 'learning_rate'?",
        "--set cases: write",
        "ladder: [4, 1]",
        "performer: unknown key 'layer'",
        "performer.hidden: expected",
        "sft.mae.max_steps: expected",
        "sft.warm_start.learning_rate: expected",
        "evaluation.operating: 'best'",
    ]
    assert [start for start, line in zip(starts, found, strict=True) if not line.startswith(start)] == []


def test_a_batch_that_splits_an_image_does_not_hide_what_is_wrong_in_a_section(recipe):
    first, second = problems(recipe(per_device_train_batch_size=12, encoder={"mp": 1}))
    assert "make the first a multiple of 8" in first and second.startswith("encoder: unknown key 'mp'")


def test_without_a_recipe_it_is_said_what_to_give(recipe):
    for argv in ([], ["--config"], ["--max_steps", "3"]):
        assert problems(argv) == ["give a recipe: --config configs/recipes/demo.yaml, or your own"]
    named = recipe()[1]
    assert str(parse_recipe([f"--config={named}"]).path) == named


def test_a_bad_value_on_the_command_line_is_one_line(recipe, capsys):
    (problem,) = problems([*recipe(), "--max_steps", "1e1x"])
    assert problem == "command line: argument --max_steps/--max-steps: invalid int value: '1e1x'"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("section", "value"), [("performer", ["a"]), ("sft", 3), ("cases", None)])
def test_a_section_that_is_no_mapping_is_named(recipe, section, value):
    (problem,) = problems(recipe(**{section: value}))
    assert problem.startswith(section)


def test_nested_keys_are_set_on_the_command_line(recipe):
    run = parse_recipe([*recipe(), "--set", "cases.slides=40", "performer.show_options=false", "sft.args.x=[1, a]"])
    assert run.cases == {"name": "simulator", "slides": 40}
    assert run.performer.show_options is False
    assert run.sft[0].options == {"args": {"x": [1, "a"]}}


def test_the_command_line_has_the_last_word(recipe):
    run = parse_recipe([*recipe(learning_rate=1e-3), "--learning_rate", "5e-5", "--max_steps", "7"])
    assert (run.grpo.learning_rate, run.grpo.max_steps) == (5e-5, 7)


@pytest.mark.parametrize("item", ["cases.slides", "slides=3", "nothing.slides=3"])
def test_an_override_that_names_no_section_is_refused(recipe, item):
    (problem,) = problems([*recipe(), "--set", item])
    assert problem.startswith(f"--set {item}: write section.key=value")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("cases.name.x=1", "name is 'simulator', which has no keys"),
        ("sft.align={}", "sft is a list; name an entry of it before the key"),
        ("performer.compressors.keep.most=3", "the recipe has no stage 'keep'; it has none"),
    ],
)
def test_an_override_of_what_has_no_such_keys_is_refused(recipe, item, message):
    argv = recipe(sft=[{"stage": "align"}], performer={"compressors": ["keep"]})
    (problem,) = problems([*argv, "--set", item])
    assert problem.startswith(f"--set {item}: {message}")


def test_an_override_of_an_unknown_key_is_refused(recipe):
    assert problems([*recipe(), "--set", "encoder.mmp=3"]) == ["encoder: unknown key 'mmp'; did you mean 'mpp'?"]


@pytest.mark.parametrize("ladder", [[], [4, 1], [1, 1, 4], [0, 4], ["1", 4], [1, 4.5], 4])
def test_a_ladder_ascends_from_one(recipe, ladder):
    (problem,) = problems(recipe(ladder=ladder))
    assert problem.startswith("ladder: ") and "ascending" in problem


def test_the_look_is_on_the_ladder(recipe):
    assert "must be budgets of the ladder" in problems(recipe(allocator={"look": [2]}))[0]


def test_a_rule_of_the_operating_price_must_be_known(recipe):
    assert problems(recipe(evaluation={"operating": "best"})) == [
        "evaluation.operating: 'best' is unknown; use one of one_error, within"
    ]


def test_an_unknown_form_is_named(recipe):
    (problem,) = problems(recipe(allocator={"form": "escalade"}))
    assert problem.startswith("allocator.form: 'escalade' is unknown; use one of value,")


def test_variables_that_would_be_set_too_late_are_refused(recipe, monkeypatch):
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MADE_UP"):
        monkeypatch.setenv(name, "1")
    parse_recipe(recipe(env={"OMP_NUM_THREADS": 1, "MADE_UP": 2}))
    assert os.environ["MADE_UP"] == "2"
    given = recipe(env={"OMP_NUM_THREADS": 4, "CUDA_VISIBLE_DEVICES": "0,1", "MADE_UP": 3})
    with pytest.raises(InputError, match=r"before the command: CUDA_VISIBLE_DEVICES=0,1 OMP_NUM_THREADS=4 python"):
        parse_recipe(given)
    assert [os.environ[name] for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MADE_UP")] == ["1", "1", "2"]


def test_an_environment_must_be_named(recipe):
    assert "`name` is missing" in problems(recipe(cases={"slides": 3}))[0]


def test_a_missing_file_is_named(tmp_path):
    (problem,) = problems(["--config", str(tmp_path / "absent.yaml")])
    assert problem == f"{tmp_path / 'absent.yaml'}: no such recipe; see configs/recipes"


@pytest.mark.parametrize(("content", "message"), [("a: [1", "not valid YAML"), ("- a\n- b\n", "expected a mapping")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    (problem,) = problems(["--config", str(path)])
    assert problem.startswith(f"{path}: ") and message in problem


def test_a_batch_that_splits_an_image_is_refused_with_the_remedy(recipe):
    (problem,) = problems(recipe(per_device_train_batch_size=12))
    assert "budgets_per_image x num_generations = 2 x 4 = 8; make the first a multiple of 8" in problem


def test_an_unknown_argument_is_refused(recipe):
    assert "--lerning_rate" in problems([*recipe(), "--lerning_rate", "1"])[0]


# Stages of supervised training.


def test_stages_are_named_after_what_they_do(recipe):
    stages = [{"stage": "align", "max_steps": 3}, {"stage": "align"}, {"stage": "case", "learning_rates": {"lora": 0}}]
    run = parse_recipe([*recipe(sft=stages), "--set", "sft.case.max_steps=9"])
    assert [(s.kind, s.name) for s in run.sft] == [("align", "sft_align"), ("align", "sft_align_2"), ("case", "sft")]
    assert run.sft[0].options == {"max_steps": 3}
    assert run.sft[2].options == {"learning_rates": {"lora": 0}, "max_steps": 9}
    run = parse_recipe([*recipe(sft=[{"stage": "mae"}, {}]), "--set", "sft.warm_start.max_steps=9"])
    assert run.sft[1].options == {"max_steps": 9}


def test_without_stages_the_warm_start_is_made_and_a_checkpoint_is_taken_as_it_is(recipe):
    assert parse_recipe(recipe()).sft == [Stage("warm_start", "sft", {})]
    assert parse_recipe(recipe(performer={"checkpoint": "there"})).sft == []
    trained = parse_recipe(recipe(performer={"checkpoint": "there"}, sft={"max_steps": 2}))
    assert trained.sft == [Stage("warm_start", "sft", {"max_steps": 2})]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"stage": "caption"}], "the stage 'caption' is unknown; use one of mae, contrastive, align, case"),
        (["align"], "entry 1 is 'align'; give a mapping"),
    ],
)
def test_a_stage_that_is_not_known_is_named(recipe, stages, message):
    with pytest.raises(InputError, match=message):
        parse_recipe(recipe(sft=stages))
    with pytest.raises(InputError, match="the recipe has no stage 'mae'; it has align"):
        parse_recipe([*recipe(sft=[{"stage": "align"}]), "--set", "sft.mae.max_steps=1"])


@pytest.mark.parametrize("kind", ["mae", "contrastive"])
def test_grpo_does_not_start_from_what_cannot_answer(kind):
    with pytest.raises(InputError, match=f"after the stage {kind} nothing answers questions yet"):
        check_answers([Stage("align", "sft_align", {}), Stage(kind, "sft", {})])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"form": "guess"}, "allocator.form: 'guess' is unknown; use one of value, policy"),
        (
            {"objective": "cheap"},
            "allocator.objective: 'cheap' is unknown; use one of linear, birr, visionthink, dual",
        ),
        ({"objective": "visionthink"}, "allocator.objective: visionthink .* set allocator.form to policy"),
        ({"objective": "dual"}, "allocator.target: .* belongs to the objective dual; set both"),
        ({"target": 0.3}, "allocator.target: .* belongs to the objective dual; set both"),
        ({"objective": "dual", "target": 3.0}, "allocator.target: 3.0 is no share"),
        ({"price_range": [0.0, 1.0]}, r"allocator.price_range: \[0.0, 1.0\] is no \[lowest, highest\]"),
        ({"objective": "log"}, "allocator.objective: log was removed before 0.1.0, .* over linear; write linear"),
        ({"form": "log"}, "allocator.form: 'log' is unknown; use one of value"),
        ({"text": {"preset": "multiplicative"}}, "allocator.text.preset: multiplicative was removed .* or birr"),
        ({"form": "policy", "explore": 0.0, "entropy": 0.0}, "allocator.explore: .* settles on one budget"),
        ({"advantage": "ppo"}, "allocator.advantage: 'ppo' is unknown; use one of rloo, grpo"),
    ],
)
def test_what_an_allocator_cannot_do_is_named(recipe, options, problem):
    (found,) = problems(recipe(allocator=options))
    assert re.match(problem, found)


def test_an_allocator_that_is_as_it_was_has_the_settings_that_it_had():
    """Finished runs are known by them."""
    later = {"form", "objective", "target", "price_range", "entropy", "entropy_decay", "advantage"}
    assert not later & set(AllocatorOptions(entropy=0.1).settings())
    assert set(AllocatorOptions(form="policy").settings()) >= {"form", "entropy", "advantage", "price_range"}
    assert AllocatorOptions(objective="dual", target=0.3).settings()["target"] == 0.3


def test_the_keys_of_the_allocator_are_documented():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text().split("\n## Allocator")[1]
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(table))) == {f.name for f in dataclasses.fields(AllocatorOptions)}


@pytest.mark.parametrize("family", ["slide_vlm", "gemma_vl"])
def test_vllm_is_refused_for_families_that_it_does_not_serve(recipe, family):
    assert problems([*recipe(performer={"family": family}), "--use_vllm", "true"]) == [
        f"use_vllm: vLLM serves performer.family qwen_vl alone, not {family} (slide_vlm is no stock model, gemma_vl "
        "pools its tokens); set use_vllm to false"
    ]


def test_vllm_goes_with_qwen_and_where_it_runs_does_not_make_another_run(recipe):
    argv = [*recipe(performer={"family": "qwen_vl"}), "--use_vllm", "true"]
    here = parse_recipe(argv)
    there = parse_recipe([*argv, "--vllm_mode", "server", "--vllm_server_port", "8001"])
    assert here.grpo.use_vllm and there.grpo.vllm_mode == "server"
    parts = []
    for run in (here, there):
        data = SimpleNamespace(run=run, bank=SimpleNamespace(missing=()), digest=str)
        parts.append(grpo_key(data)["grpo"])
    assert parts[0] == parts[1] and parts[0]["use_vllm"]
