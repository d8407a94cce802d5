"""`hf-mel demo`: the whole way on the embedded data set, from nothing to a linked mention."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

_DATASET, _RECIPE = "flags_mel", "mimic_flags"


def demo(
    folder: Annotated[Path, typer.Option(help="Where data/, runs/ and kb/ go.")] = Path("."),
) -> None:
    """Build FlagsMEL, train a small MIMIC on it, evaluate it, build its knowledge base, link a mention.

    Everything happens on this machine, from scratch, with no download. Each step names the command that does it alone.
    A finished training is not repeated; delete the run folder to train again.
    """
    from rich.console import Console

    import hf_mel.auto  # noqa: F401 (the shipped methods register with the Auto classes)
    from hf_mel.building.build import build_dataset
    from hf_mel.cli.link import link
    from hf_mel.data.loading import dataset_version, load_entities, load_mentions
    from hf_mel.evaluation.tables import results_table, write_results
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.kb.knowledge_base import KnowledgeBase
    from hf_mel.training.recipe import Recipe
    from hf_mel.training.run import run_recipe

    data, run, kb_folder = folder / "data" / _DATASET, folder / "runs" / _RECIPE, folder / "kb" / _DATASET
    results_file, photo = run / "results_test.json", run / "example.png"
    console = Console()

    def step(number: int, title: str, command: str) -> None:
        console.print()
        console.rule(f"[b]{number}/5  {title}", align="left")
        console.print(f"$ {command}", style="dim", markup=False, highlight=False, soft_wrap=True)

    step(1, "Build the data set", f"hf-mel data build {_DATASET} --output {data}")
    report = build_dataset(_DATASET, output=data)
    counts = ", ".join(f"{n:,} {split}" for split, n in report.counts["mentions"].items())
    console.print(f"Mentions of states by flags and words: {counts}; {report.counts['entities']['kb']} entities.")

    step(2, "Train a small MIMIC from scratch", f"hf-mel train {_RECIPE} --set data.dataset={data} --output {run}")
    run_recipe(Recipe.load(_RECIPE, [f"data.dataset={data}"]), output=run, resume=True)

    step(3, "Evaluate it", f"hf-mel evaluate {run} --dataset {data} --split test --output {results_file}")
    model, processor = load_retriever(run)
    entities, mentions = load_entities(data), load_mentions(data, "test")
    results = _evaluate(model, processor, mentions, entities, {**dataset_version(data), "split": "test"})
    write_results(
        {**results["all units"], "units alone": {k: v for k, v in results.items() if v["units"]}}, results_file
    )
    console.print(results_table(results["all units"]))
    console.print(_units_table(results))
    console.print("Each unit ranks alone in its row; text and vision see one modality, cross_modal and all see both.")

    step(4, "Build the knowledge base", f"hf-mel kb build {run} --dataset {data} --output {kb_folder}")
    kb = KnowledgeBase.build(str(data), model, processor, output=kb_folder)
    console.print(f"{len(kb)} entities with their encodings.")

    wanted = [
        row
        for row, (stratum, gold) in enumerate(zip(mentions["stratum"], mentions["entity_id"], strict=True))
        if stratum == "both" and gold in kb
    ]
    example = mentions[wanted[0]]
    example["image"].save(photo)
    place = f"--start {example['start']} --end {example['end']} --image {photo}"
    step(5, "Link a mention", f"hf-mel link {run} --kb {kb_folder} --text {shlex.quote(example['text'])} {place}")
    link(
        str(run),
        kb=str(kb_folder),
        text=example["text"],
        start=example["start"],
        end=example["end"],
        image=photo,
        top_k=5,
    )
    gold = kb.rows([kb.row_of(example["entity_id"])])[0]
    console.print(f"The gold of this test mention is {gold['name']} ({gold['entity_id']}).", highlight=False)

    console.print()
    console.rule("[b]Where things are", align="left")
    for what, where in (
        ("data set", data),
        ("model, card, training plot", run),
        ("results on test", results_file),
        ("knowledge base", kb_folder),
    ):
        console.print(f"  {what:<27} {where}", markup=False, highlight=False)
    console.print("What to type next (first: source .venv/bin/activate, if you came by `make demo`):")
    for command in (
        f'hf-mel link {run} --kb {kb_folder} --text "The hosts raised their flag in Accra." --mention "The hosts" --json',
        f"hf-mel kb build {run} --entities mine.csv --output kb/mine      # your own entities: id,name,description,image",
        "hf-mel space      # the same in a browser",
        "hf-mel --help",
    ):
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _evaluate(model: Any, processor: Any, mentions: Any, entities: Any, version: dict) -> dict[str, Any]:
    """Results on the same encodings with all units, and with each unit alone."""
    from hf_mel.evaluation.full_evaluator import evaluate_full
    from hf_mel.inference.encode import encode_rows
    from hf_mel.inference.encodings import slice_encodings
    from hf_mel.inference.ranking import EncodedEntities

    known = EncodedEntities(list(entities["entity_id"]), encode_rows(model, processor, entities, "entities"))
    encoded = encode_rows(model, processor, mentions, "mentions")
    units = model.unit_scores(slice_encodings(encoded, slice(1)), slice_encodings(known.tensors, slice(1)))
    results = {}
    for name, chosen in {"all units": None, **{f"{unit} unit": [unit] for unit in units}}.items():
        results[name] = evaluate_full(
            model,
            processor,
            mentions,
            known,
            units=chosen,
            strata=["stratum"],
            mention_encodings=encoded,
            nil_threshold=getattr(model.config, "nil_threshold", None) if chosen is None else None,
            data_version=version,
        ).to_dict()
    return results


def _units_table(results: dict[str, Any]) -> Table:
    from hf_mel.evaluation.tables import comparison_table

    rows = {}
    for name, result in results.items():
        rows[name] = {"hits@1": result["metrics"]["hits@1"], "mrr": result["metrics"]["mrr"]} | {
            f"hits@1 {stratum}": metrics["hits@1"] for stratum, metrics in result["strata"]["stratum"].items()
        }
    return comparison_table(rows, title="What each unit knows: H@1 by what decides")
