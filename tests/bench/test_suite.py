"""Suite files: what they may say, the lines that errors name, and the cells that they make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.bench.cells import RowKey, grid_cells, inputs_digest, measured_values, prepared_cells
from hf_mel.bench.suite import EVALUATE_OPTIONS, Suite, recipe_overrides, shipped_suites
from hf_mel.errors import SuiteError
from hf_mel.training.recipe import DataRecipe, Recipe

SUITE = """name: mine
data:
  wikimel: data/wikimel
  flags: {dataset: data/flags_mel, split: validation}
seeds: [0, 1]
budget:
  max_steps: 100
prepare:
  retriever:
    recipe: mimic-text_wikimel
    data: wikimel
evaluate:
  candidates: retriever
  retriever: run:retriever
  num_candidates: 8
  name_weight: 0
systems:
  - name: MIMIC
    recipe:
      wikimel: mimic-text_wikimel
      flags: mimic_flags
  - name: MMEL
    recipe: mmel-text_wikimel
    data: wikimel
    seeds: [3]
    train_fractions: [0.1, 1]
    set:
      candidates.retriever: run:retriever
      training.learning_rate: 1e-5
  - name: order of the list
    order: list
    data: [wikimel]
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Suite:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return Suite.load(file, overrides)


def test_the_cells_of_a_suite(tmp_path):
    suite = load(tmp_path, SUITE)
    cells = grid_cells(suite, Path("runs"))
    assert [(cell.row.data, cell.row.label, cell.seed) for cell in cells] == [
        ("wikimel", "MIMIC", 0),
        ("flags", "MIMIC", 0),
        ("wikimel", "order of the list", 0),
        ("wikimel", "MIMIC", 1),
        ("flags", "MIMIC", 1),
        ("wikimel", "MMEL, 10 % of training", 3),
        ("wikimel", "MMEL", 3),
    ]
    assert len({cell.folder for cell in cells}) == len(cells)
    mimic, flags, order, _, _, part, whole = cells
    assert mimic.evaluate_arguments()[6:] == [
        "--output", str(mimic.folder / "evaluation.json"), "--predictions", str(mimic.folder / "predictions.jsonl"),
        "--name-weight", "0",
    ]  # fmt: skip
    assert flags.evaluate_arguments()[2:6] == ["--dataset", "data/flags_mel", "--split", "validation"]
    retriever = str(Path("runs/prepared/retriever/run"))
    of_lists = ["--candidates", "retriever", "--retriever", retriever, "--num-candidates", "8"]
    assert whole.evaluate_arguments()[-6:] == of_lists
    assert order.commands() == [order.evaluate_arguments()]
    assert order.evaluate_arguments()[:2] == ["evaluate", "--no-model"]
    assert sorted(order.evaluate_arguments()[-6:]) == sorted(of_lists)
    assert part.recipe().data.train_fraction == 0.1
    assert part.recipe().candidates.retriever == retriever
    assert part.recipe().training["max_steps"] == 100
    assert part.recipe().training["learning_rate"] == 1e-5
    assert whole.recipe().data.train_fraction == 1
    assert (mimic.reranks, whole.reranks, order.reranks) == (False, True, True)
    assert part.references == ["retriever"]
    assert mimic.references == []
    prepared = prepared_cells(suite, Path("runs"))
    assert [cell.folder for cell in prepared] == [Path("runs/prepared/retriever")]
    assert prepared[0].recipe().data.dataset == "data/wikimel"
    assert "max_steps" not in prepared[0].recipe().training


def test_candidates_that_the_suite_does_not_name_are_those_of_the_recipe(tmp_path):
    text = SUITE.replace("  candidates: retriever\n  retriever: run:retriever\n  num_candidates: 8\n", "")
    text = text[: text.index("  - name: order")]
    cell = grid_cells(load(tmp_path, text), Path("runs"))[-1]
    section = Recipe.load("mmel-text_wikimel").candidates
    assert cell.evaluate_options() == {
        "candidates": section.source,
        "num_candidates": section.k,
        "retriever": str(Path("runs/prepared/retriever/run")),
    }


def test_options_of_models_are_not_given_to_an_order(tmp_path):
    text = SUITE.replace("  candidates: retriever\n", "  bf16: true\n  joint: false\n  candidates: retriever\n")
    cells = {cell.system.name: cell.evaluate_options() for cell in grid_cells(load(tmp_path, text), Path("runs"))}
    assert {name: ("bf16" in options, "joint" in options) for name, options in cells.items()} == {
        "MIMIC": (True, False),
        "MMEL": (True, True),
        "order of the list": (False, False),
    }


def test_a_sweep_makes_a_row_of_every_value(tmp_path):
    text = SUITE.replace("systems:", "sweep: {field: model.config.local_scale, values: [0, 0.5]}\nsystems:")
    text = text[: text.index("  - name: MMEL")]
    cells = grid_cells(load(tmp_path, text, "seeds=[0]"), Path("runs"))
    assert [cell.row for cell in cells if cell.row.data == "wikimel"] == [
        RowKey("wikimel", "MIMIC", 1.0, "model.config.local_scale", value) for value in ("0", "0.5")
    ]
    assert [cell.recipe().model.config["local_scale"] for cell in cells] == [0, 0.5, 0, 0.5]
    assert cells[1].row.label == "MIMIC, local_scale 0.5"


def test_a_prepared_run_of_every_seed(tmp_path):
    text = SUITE.replace("    data: wikimel\nevaluate", "    data: wikimel\n    per_seed: true\nevaluate")
    suite = load(tmp_path, text)
    assert [(cell.folder.name, cell.recipe().training["seed"]) for cell in prepared_cells(suite, Path("runs"))] == [
        ("retriever-seed0", 0),
        ("retriever-seed1", 1),
        ("retriever-seed3", 3),
    ]
    whole = grid_cells(suite, Path("runs"))[-1]
    assert whole.recipe().candidates.retriever == str(Path("runs/prepared/retriever-seed3/run"))


def test_an_order_has_one_cell_of_the_suites_first_seed(tmp_path):
    text = SUITE.replace("    data: wikimel\nevaluate", "    data: wikimel\n    per_seed: true\nevaluate")
    suite = load(tmp_path, text, "seeds=[4, 5]")
    orders = [cell for cell in grid_cells(suite, Path("runs")) if cell.system.name == "order of the list"]
    assert [cell.seed for cell in orders] == [4]
    assert "runs/prepared/retriever-seed4/run" in " ".join(orders[0].commands()[-1])
    assert "retriever-seed4" in {cell.folder.name for cell in prepared_cells(suite, Path("runs"))}


def test_a_system_may_have_its_recipes_own_length(tmp_path):
    text = SUITE.replace("  - name: MMEL\n", "  - name: MMEL\n    budget: none\n")
    cells = grid_cells(load(tmp_path, text, "budget={minutes: 2}"), Path("runs"))
    assert "max_minutes" not in cells[-1].recipe().training
    assert cells[0].recipe().training["max_minutes"] == 2


def test_a_prepared_run_may_be_a_folder_that_exists(tmp_path):
    suite = load(tmp_path, SUITE, f"prepare.retriever.folder={tmp_path}")
    assert prepared_cells(suite, Path("runs")) == []
    assert grid_cells(suite, Path("runs"))[-1].recipe().candidates.retriever == str(tmp_path)
    with pytest.raises(SuiteError, match="run folder 'nowhere' does not exist"):
        load(tmp_path, SUITE, "prepare.retriever.folder=nowhere")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seedz:", r"mine.yaml, row 5: Unknown field 'seedz' in the suite. Did you mean 'seeds'"),
        ("max_steps: 100", "max_step: 1", r"row 7: Unknown field 'max_step' in budget. Did you mean 'max_steps'"),
        ("  num_candidates: 8", "  num_candidate: 8", r"row 15: Unknown field 'num_candidate' in evaluate. Did you mean 'num"),
        ("    data: [wikimel]", "    data: [wikimell]", r"row 32: The suite has no data set 'wikimell'. Did you mean 'wikimel'"),
        ("recipe: mmel-text_wikimel", "recipe: mmel-txt_wikimel", r"row 23: The recipe 'mmel-txt_wikimel' does not exist. Did you mean 'mmel-text_wikimel'"),
        ("candidates.retriever: run:", "candidates.retriver: run:", r"row 23: .*unknown key 'candidates.retriver'. Did you mean 'retriever'"),
        ("training.learning_rate", "training.learning_rat", r"row 23: .*unknown key 'training.learning_rat'. Did you mean 'learning_rate'"),
        ("training.learning_rate", "model.config.hidden_siz", r"row 23: .*unknown key 'model.config.hidden_siz'. Did you mean"),
        ("name: order of the list", "name: MMEL", r"row 30: Two systems are named 'MMEL'"),
        ("order: list", "ordr: list", r"row 31: Unknown field 'ordr' in systems.2"),
        ("order: list\n", "note: nothing\n", r"row 30: A system has either a recipe or an order"),
        ("candidates.retriever: run:retriever", "candidates.retriever: run:retreiver", r"row 28: .*run 'retreiver', which is not prepared before. Did you mean 'retriever'"),
        ("seeds: [0, 1]", "seeds: [0, 0]", r"row 5: 'seeds' is empty or names a value twice"),
        ("seeds: [0, 1]", "seeds: [0, x]", r"row 5: 'x' in 'seeds' is not a whole number"),
        ("train_fractions: [0.1, 1]", "train_fractions: [0.1, 2]", r"row 26: The fraction 2 is not above 0"),
        ("  max_steps: 100", "  max_steps: -1", r"row 7: The budget max_steps is -1"),
        ("name: mine", "name: a/b", r"row 1: The name 'a/b' is not usable"),
        ("budget:\n", "compare_with: MIMI\nbudget:\n", r"row 6: The suite has no system 'MIMI' to compare with. Did you mean 'MIMIC'"),
        ("    recipe: mmel-text_wikimel", "    recipe: [a", r"row \d+: The suite is not valid YAML"),
        ("systems:\n", "systems: {}\nold:\n", r"The value \{\} of 'systems' in the suite has the wrong type"),
        ("  wikimel: data/wikimel\n", "  wikimel: {split: test}\n", r"row 3: data.wikimel has no 'dataset'"),
    ],
)  # fmt: skip
def test_errors_name_the_line_and_the_most_similar_name(tmp_path, old, new, message):
    assert SUITE.count(old) >= 1
    with pytest.raises(SuiteError, match=message):
        load(tmp_path, SUITE.replace(old, new, 1))


def test_an_unknown_suite_lists_those_that_there_are():
    with pytest.raises(SuiteError, match=r"flag.*Did you mean 'flags'"):
        Suite.load("flag")


@pytest.mark.parametrize("name", shipped_suites())
def test_shipped_suites_load_and_their_cells_are_commands_that_parse(name):
    from tests.test_docs import parse

    suite = Suite.load(name)
    assert suite.name == name
    for cell in grid_cells(suite, Path("runs")):
        if cell.recipe_name is None and cell.system.order is None:
            continue
        for words in cell.commands():
            if "--no-model" not in words:
                parse(words)


def test_options_of_a_suite_are_options_of_evaluate():
    import inspect

    from hf_mel.cli.evaluate import evaluate

    assert set(EVALUATE_OPTIONS) <= set(inspect.signature(evaluate).parameters)


TEXTS = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]))


@given(
    st.dictionaries(
        st.sampled_from(["description", "model.config.x", "training.y", "data.revision"]),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
        | st.lists(TEXTS | st.integers()),
    )
)  # fmt: skip
def test_values_survive_the_command_line(values):
    minimal = {"name": "mine", "model": {"type": "some", "text": "a/b"}, "data": {"dataset": "d"}}
    text = {key: value for key, value in values.items() if key in ("description", "data.revision")}
    values = {key: value for key, value in values.items() if key not in text or isinstance(value, str)}
    content = json.loads(json.dumps(minimal))
    from hf_mel.training.recipe import apply_override

    for override in recipe_overrides(values):
        apply_override(content, override, None)
    recipe = Recipe.from_dict(content)
    sections = {"model.config.x": recipe.model.config.get("x"), "training.y": recipe.training.get("y")}
    sections |= {"description": recipe.description, "data.revision": recipe.data.revision}
    for key, value in values.items():
        assert sections[key] == value


def test_what_does_not_matter_does_not_change_the_inputs(tmp_path):
    suites = [
        load(tmp_path, SUITE),
        load(tmp_path, SUITE.replace("name: mine", "name: other\ntitle: Other")),
        load(tmp_path, SUITE.replace("data/wikimel", "elsewhere/wikimel")),
    ]
    digests = [
        inputs_digest(grid_cells(suite, Path(f"r{i}"))[-1].inputs(lambda _: "v")) for i, suite in enumerate(suites)
    ]
    assert digests[0] == digests[1] == digests[2]
    changes = [
        ("learning_rate: 1e-5", "learning_rate: 2e-5"),
        ("num_candidates: 8", "num_candidates: 9"),
        ("max_steps: 100", "max_steps: 99"),
    ]
    for old, new in changes:
        changed = load(tmp_path, SUITE.replace(old, new))
        assert inputs_digest(grid_cells(changed, Path("r"))[-1].inputs(lambda _: "v")) != digests[0]
    assert inputs_digest(grid_cells(suites[0], Path("r"))[-1].inputs(lambda _: "w")) != digests[0]


def test_a_model_that_changed_changes_the_inputs(tmp_path):
    folder = tmp_path / "runs/prepared/retriever/run"
    folder.mkdir(parents=True)
    digests = []
    suite = load(tmp_path, yaml.safe_dump(yaml.safe_load(SUITE)))
    for weights in (b"a", b"b", b"b"):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        from hf_mel.bench import cells

        cells._path_digest.cache_clear()
        digests.append(inputs_digest(grid_cells(suite, tmp_path / "runs")[-1].inputs(lambda _: "v")))
    assert digests[0] != digests[1] == digests[2]


def test_a_field_that_a_later_version_adds_changes_no_inputs(tmp_path):
    recipe = Recipe.load("mimic-text_wikimel", ["training.seed=1"])
    measured = measured_values(recipe, with_dataset=False)
    assert measured["training"]["seed"] == 1
    assert measured["model"]["config"]["units"] == ["text"]
    assert "dataset" not in measured["data"]
    assert not {"description", "citation", "name", "source", "candidates"} & measured.keys()
    defaults = DataRecipe()
    for name, value in vars(defaults).items():
        assert name not in measured["data"], f"{name} is {value!r}, its default"
    recipe.data.train_fraction = 0.5
    assert measured_values(recipe, with_dataset=True)["data"] == {"dataset": "data/wikimel", "train_fraction": 0.5}
