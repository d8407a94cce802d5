"""`hf-mel evaluate`: a model against the whole knowledge base."""

from __future__ import annotations

import time
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


class Ties(str, Enum):
    """What rank a gold has among entities that score the same."""

    REALISTIC = "realistic"
    OPTIMISTIC = "optimistic"
    PESSIMISTIC = "pessimistic"


def evaluate(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model on the Hub.")],
    dataset: Annotated[str, typer.Option(help="A data-set folder, or a data set on the Hub.")],
    split: Annotated[str, typer.Option(help="Which mentions: train, validation or test.")] = "test",
    config: Annotated[
        str, typer.Option(help="The configuration of the mentions, for a data set that has several.")
    ] = "mentions",
    output: Annotated[Path | None, typer.Option(dir_okay=False, help="Where to write the results as JSON.")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Where to write each mention's ranked candidates, as JSON lines."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows to encode at a time.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Candidates per mention in the predictions.")] = 20,
    ks: Annotated[str, typer.Option(help="Every k of H@k.")] = "1,3,5,10,20",
    ties: Annotated[Ties, typer.Option(help="Rank of a gold that ties: mean, best or worst position.")] = (
        Ties.REALISTIC
    ),
    units: Annotated[
        str | None, typer.Option(help="Score with these of the model's units only, for instance text,vision.")
    ] = None,
    nil_threshold: Annotated[
        float | None,
        typer.Option(help="A mention is NIL if its best score is below this. Default: the model's, if it has one."),
    ] = None,
    nil_from: Annotated[
        str | None, typer.Option(help="A split to choose the NIL threshold on, for instance validation.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model, if it is not ours.")
    ] = False,
) -> None:
    """Rank every entity of the knowledge base for every mention, and print H@k, MRR and MR, overall and by stratum.

    Seen and unseen golds are told apart where the data set has a training split.

    Examples:

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --split test --output results.json

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --units vision --predictions vision.jsonl
    """
    try:
        k_list = [int(k) for k in ks.split(",")]
    except ValueError:
        k_list = [0]
    if min(k_list) < 1:
        raise typer.BadParameter(f"{ks!r} is not a list of numbers of at least 1, such as 1,5,10.", param_hint="--ks")
    if nil_threshold is not None and nil_from is not None:
        raise typer.BadParameter("Give a threshold or a split to choose it on, not both.", param_hint="--nil-from")

    from rich.console import Console

    from hf_mel.data.loading import dataset_version, load_entities, load_mentions
    from hf_mel.errors import UnknownSplitError
    from hf_mel.evaluation.full import check_units, evaluate_full
    from hf_mel.evaluation.tables import results_table, write_records, write_results
    from hf_mel.linking.encodings import encode_rows
    from hf_mel.linking.loading import load_retriever
    from hf_mel.linking.ranking import EncodedEntities

    mentions, entities = load_mentions(dataset, split, config=config), load_entities(dataset)
    validation = None if nil_from is None else load_mentions(dataset, nil_from, config=config)
    try:
        train_golds = None if split == "train" else set(load_mentions(dataset, "train", config=config)["entity_id"])
    except UnknownSplitError:
        train_golds = None
    version = dataset_version(dataset)
    start = time.perf_counter()
    retriever, processor = load_retriever(model, device=device, trust_remote_code=trust_remote_code)
    unit_list = None if units is None else units.split(",")
    if unit_list is not None:
        check_units(retriever, processor, mentions, entities, unit_list)
    encodings = encode_rows(retriever, processor, entities, "entities", batch_size=batch_size, progress=True)
    evaluate_on = partial(
        evaluate_full,
        retriever,
        processor,
        entities=EncodedEntities(list(entities["entity_id"]), encodings),
        batch_size=batch_size,
        ks=k_list,
        ties=ties.value,
        units=unit_list,
    )
    calibration = None
    if validation is not None:
        calibration = evaluate_on(validation, top_k=2).calibrate_nil_threshold()
        nil_threshold = calibration.threshold
    elif nil_threshold is None and units is None:  # a threshold is one of the whole score
        nil_threshold = getattr(retriever.config, "nil_threshold", None)
    result = evaluate_on(
        mentions,
        top_k=top_k,
        train_golds=train_golds,
        nil_threshold=nil_threshold,
        data_version={**version, "split": split, **({} if config == "mentions" else {"config": config})},
    )

    results = {**result.to_dict(), "wall_time_seconds": round(time.perf_counter() - start, 3)}
    if calibration is not None:
        results["nil_calibration"] = {"split": nil_from, **asdict(calibration)}
    console = Console()
    console.print(results_table(results))
    if predictions is not None:
        write_records(result.records(), predictions)
        console.print(f"Candidates of every mention: {predictions}", markup=False)
    if output is not None:
        write_results(results, output)
        console.print(f"Results: {output}", markup=False)
