"""`hf-mel demo`: every step on a generated data set, from building it to an annotated post."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_mel.cli.printing import print_annotated, show_logs
from hf_mel.terminal import safe_text

if TYPE_CHECKING:
    from rich.table import Table

_DATASET, _RECIPE = "flags_mel", "mimic_flags"
_STRATA = {"text": "text", "image": "picture", "both": "both together"}
_UNITS = {"text": "text", "vision": "picture", "cross_modal": "fused"}


def demo(
    folder: Annotated[Path, typer.Option(help="The folder in which data/, runs/ and kb/ are created.")] = Path("."),
) -> None:
    """Build FlagsMEL, train a small MIMIC on it, evaluate it, build its knowledge base, link a mention, annotate
    a whole post.

    Everything happens on this machine, from scratch, with no download. Each step prints the command that does it alone.
    A finished training is not repeated. Delete the run folder to train again.
    """
    from rich.console import Console
    from transformers.utils import logging

    from hf_mel.building.build import build_dataset
    from hf_mel.data.loading import dataset_version, load_entities, load_mentions
    from hf_mel.detection.gazetteer import Gazetteer
    from hf_mel.evaluation.tables import write_results
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.kb.knowledge_base import KnowledgeBase
    from hf_mel.linking.annotations_page import write_annotations_page
    from hf_mel.linking.linker import EntityLinker
    from hf_mel.training.recipe import Recipe
    from hf_mel.training.run import run_recipe

    data, run, kb_folder = folder / "data" / _DATASET, folder / "runs" / _RECIPE, folder / "kb" / _DATASET
    results_file, photo = run / "results_test.json", run / "example.png"
    post_photo, page = run / "post.png", run / "post.html"
    console = Console(highlight=False)
    logging.disable_progress_bar()  # of reading weights, which takes a tenth of a second here

    def step(number: int, title: str, command: str) -> None:
        console.print()
        console.rule(f"[b]{number}/6  {title}", align="left")
        console.print(f"$ {command}", style="dim", markup=False, soft_wrap=True)

    step(1, "Build the data set", f"hf-mel data build {_DATASET} --output {data}")
    report = build_dataset(_DATASET, output=data)
    counts = ", ".join(f"{count:,} for {split}" for split, count in report.counts["mentions"].items())
    console.print(
        f"FlagsMEL: sentences that mention a state, most with a picture of its flag. Mentions: {counts}. "
        f"Knowledge base: {report.counts['entities']['kb']} states."
    )

    step(2, "Train a small MIMIC", f"hf-mel train {_RECIPE} --set data.dataset={data} --output {run}")
    console.print("The model starts from random weights. It needs a few minutes on two free cores.")
    with show_logs():
        run_recipe(Recipe.load(_RECIPE, [f"data.dataset={data}"]), output=run, resume=True)

    step(3, "Evaluate it", f"hf-mel evaluate {run} --dataset {data} --split test --output {results_file}")
    model, processor = load_retriever(run)
    entities, mentions = load_entities(data), load_mentions(data, "test")
    results = _evaluate(model, processor, mentions, entities, {**dataset_version(data), "split": "test"})
    overall, *single_units = results.values()
    write_results({**overall, "units alone": {_unit_of(result): result for result in single_units}}, results_file)
    console.print(_accuracy_table(overall, single_units))
    console.print(
        f"H@1: the right state ranks first among {len(entities)}, in percent of the mentions. H@3: it is among the first "
        "three. MRR: mean of 1/rank. The last columns rank by the text alone, by the picture alone, and by a fusion of both alone."
    )
    if overall["num_nil"]:
        recall, precision = (overall["metrics"].get(f"nil_{share}", 0.0) for share in ("recall", "precision"))
        right = f", and is right about {100 * precision:.0f} % of those it finds" if precision == precision else ""
        console.print(
            f"{overall['num_nil']} more mentions name a state that is not in the knowledge base (NIL). The model finds "
            f"{100 * recall:.0f} % of them{right}."
        )

    step(4, "Build the knowledge base", f"hf-mel kb build {run} --dataset {data} --output {kb_folder}")
    kb = KnowledgeBase.build(str(data), model, processor, output=kb_folder)
    console.print(f"{len(kb)} states, each encoded once. Linking only encodes the mention.")

    example = next(
        mention
        for mention, stratum, gold in zip(mentions, mentions["stratum"], mentions["entity_id"], strict=True)
        if stratum == "both" and gold in kb
    )
    example["image"].save(photo)
    place = f"--start {example['start']} --end {example['end']} --image {photo}"
    step(5, "Link a mention", f"hf-mel link {run} --kb {kb_folder} --text {shlex.quote(example['text'])} {place}")
    linker = EntityLinker(model, processor, kb)
    result = linker(text=example["text"], start=example["start"], end=example["end"], image=photo, top_k=5)
    console.print(_candidates_table(result, example["mention"]))
    gold = kb.rows([kb.row_of(example["entity_id"])])[0]
    console.print(
        "The score is a weighted mean of the three scores beside it, each of one unit of the model, less a score of NIL."
    )
    console.print(f"The right answer is {gold['name']} ({gold['entity_id']}).")

    post, golds = _example_post(mentions, kb)
    post["image"].save(post_photo)
    place = f"--learn-from {data} --image {post_photo} --html {page}"
    step(
        6,
        "Annotate a whole post",
        f"hf-mel annotate {run} --kb {kb_folder} --text {shlex.quote(post['text'])} {place}",
    )
    gazetteer = Gazetteer.from_kb(
        kb, training=load_mentions(data, "train"), validation=load_mentions(data, "validation")
    )
    annotated = linker.annotate(post["text"], image=post_photo, detector=gazetteer)
    console.print(
        "No mention is marked. The gazetteer finds the names of the states and the surface forms of the training mentions, "
        f"{len(gazetteer):,} in all. The model reads the photo with each."
    )
    print_annotated(annotated)
    names = {entity_id: kb.rows([kb.row_of(entity_id)])[0]["name"] for _, entity_id in golds}
    console.print("Right: " + ", ".join(f"{words} → {names[entity_id]}" for words, entity_id in golds) + ".")
    write_annotations_page(
        page,
        [{**annotated.to_dict(), "photo": post["image"]}],
        entity_image=lambda entity_id: kb.image(kb.row_of(entity_id)),
        title="Annotated post",
    )

    console.print()
    console.rule("[b]Done. Where things are", align="left")
    for content, location in (
        ("data set", data),
        ("model, card, training plot", run),
        ("results on test", results_file),
        ("knowledge base", kb_folder),
        ("annotated post, for a browser", page),
    ):
        console.print(f"  {content:<30} {location}", markup=False)
    console.print("What to type next (after `make demo`, first: source .venv/bin/activate):")
    for command in (
        f'hf-mel link {run} --kb {kb_folder} --text "The hosts met in Accra." --mention "The hosts"',
        "hf-mel space      # the same in a browser",
        "hf-mel --help",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)
    console.print(
        "This model knows only the words of FlagsMEL. For your own entities take a text encoder, which needs no training:"
    )
    console.print(
        "  hf-mel kb build sentence-transformers/all-MiniLM-L6-v2 --entities mine.csv --output kb/mine",
        markup=False,
        soft_wrap=True,
    )


def _example_post(mentions: Any, kb: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Returns the first post with a photo and several mentions of known entities, and its mentions with their golds."""
    contexts: dict[str, list[int]] = {}
    for row, (context, gold) in enumerate(zip(mentions["context_id"], mentions["entity_id"], strict=True)):
        if gold in kb:
            contexts.setdefault(context, []).append(row)
    posts = ([mentions[row] for row in rows] for rows in contexts.values() if len(rows) > 1)
    rows = next(rows for rows in posts if rows[0]["image"] is not None)
    return rows[0], [(row["mention"], row["entity_id"]) for row in sorted(rows, key=lambda row: row["start"])]


def _evaluate(model: Any, processor: Any, mentions: Any, entities: Any, version: dict) -> dict[str, Any]:
    """Returns results with all units of the model, then with each unit alone, from one pass of the encoders."""
    from hf_mel.evaluation.full_evaluator import FullEvaluator
    from hf_mel.evaluation.strata import names_by_id
    from hf_mel.inference.encode import encode_rows
    from hf_mel.inference.encodings import slice_encodings
    from hf_mel.inference.entity_sources import EncodedEntities
    from hf_mel.inference.inputs import ModelInputs

    inputs = ModelInputs(model, processor)
    ranked_entities = EncodedEntities(list(entities["entity_id"]), encode_rows(inputs, entities, "entities"))
    encoded = encode_rows(inputs, mentions, "mentions")
    units = model.unit_scores(slice_encodings(encoded, slice(1)), slice_encodings(ranked_entities.tensors, slice(1)))
    results = {}
    for name, chosen in {"all units": None, **{unit: [unit] for unit in units}}.items():
        evaluator = FullEvaluator(
            ranked_entities,
            units=chosen,
            strata=["stratum"],
            entity_names=names_by_id(entities),
            nil_threshold=getattr(model.config, "nil_threshold", None) if chosen is None else None,
            data_version=version,
            progress=chosen is None,
        )
        results[name] = evaluator(inputs, mentions, mention_encodings=encoded).to_dict()
    return results


def _unit_of(result: dict[str, Any]) -> str:
    """Returns the name of the only unit by which a result was ranked."""
    return f"{result['units'][0]} unit"


def _accuracy_table(overall: dict[str, Any], single_units: list[dict[str, Any]]) -> Table:
    """Returns a table of all mentions and of each stratum, with H@1 of every unit alone beside the whole model."""
    from rich.table import Table

    from hf_mel.evaluation.tables import display_value

    table = Table("decided by", title="Test mentions, by what tells the states apart")
    units = [_UNITS.get(result["units"][0], result["units"][0]) for result in single_units]
    for column in ["mentions", "H@1", "H@3", "MRR", *(f"H@1\n{unit}" for unit in units)]:
        table.add_column(column, justify="right")

    def add(label: str, metrics: dict[str, Any], metrics_of_units: list[dict[str, Any]]) -> None:
        values = [display_value(name, metrics[name]) for name in ("hits@1", "hits@3", "mrr")]
        values += [display_value("hits@1", unit_metrics["hits@1"]) for unit_metrics in metrics_of_units]
        table.add_row(label, f"{metrics['num_ranked']:,}", *values)

    add("all", overall["metrics"], [result["metrics"] for result in single_units])
    for stratum, metrics in overall["strata"]["stratum"].items():
        label = _STRATA.get(stratum, stratum)
        add(label, metrics, [result["strata"]["stratum"][stratum] for result in single_units])
    return table


def _candidates_table(result: Any, mention: str) -> Table:
    """Returns a table of the best candidates of one mention, with their scores."""
    from rich.table import Table
    from rich.text import Text

    units = list(result.candidates[0].unit_scores)
    table = Table("", "entity", title=Text(f"'{safe_text(mention)}' may mean"))
    for column in ["score", *(_UNITS.get(unit, unit) for unit in units)]:
        table.add_column(column, justify="right")
    for candidate in result.candidates:
        scores = [candidate.score, *(candidate.unit_scores[unit] for unit in units)]
        table.add_row(str(candidate.rank), Text(safe_text(candidate.name)), *(f"{score:.1f}" for score in scores))
    return table
