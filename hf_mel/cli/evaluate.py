"""`hf-mel evaluate`: a model against the whole knowledge base, or a reranker against candidate lists."""

from __future__ import annotations

import time
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

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
    posts: Annotated[
        str,
        typer.Option(
            help="What a model that knows entities by posts knows them by: [b]auto[/b], the data set's posts, or without "
            "any the captions of its training split; [b]none[/b]; or a split."
        ),
    ] = "auto",
    nil_from: Annotated[
        str | None, typer.Option(help="A split to choose the NIL threshold on, for instance validation.")
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="For a reranker: a file that [b]hf-mel candidates[/b] wrote, or [b]name[/b], [b]prior[/b], "
            "[b]retriever[/b], [b]release[/b], or several of them joined by +, and after these [b]document[/b]."
        ),
    ] = None,
    num_candidates: Annotated[int, typer.Option(min=1, help="Candidates per mention at most.")] = 100,
    scorer: Annotated[str, typer.Option(help="How names are compared.")] = "WRatio",
    retriever: Annotated[
        str | None, typer.Option(help="The retriever whose candidates are reranked: a run folder or a model.")
    ] = None,
    joint: Annotated[
        bool | None,
        typer.Option("--joint/--no-joint", help="Rank the mentions of a context together. Default: if it can."),
    ] = None,
    candidate_weight: Annotated[
        str | None,
        typer.Option(
            help="Add the candidates' own scores to the reranker's: a number, 0 the reranker alone, or [b]auto[/b] to "
            "find it on validation."
        ),
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16", help="Let a reranker compute in bfloat16: faster with native support only, scores to 3 digits."
        ),
    ] = False,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model, if it is not ours.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
    dataset_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a data set on the Hub.")
    ] = None,
) -> None:
    """Rank every entity of the knowledge base for every mention, and print H@k, MRR and MR, overall and by stratum.

    What some papers call P@1, R@3 and R@10 is H@1, H@3 and H@10.

    Seen and unseen golds are told apart where the data set has a training split. A reranker puts the candidates of
    every mention into a new order; its results come end to end and with the gold added, beside the order it was given.

    Examples:

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --split test --output results.json

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --units vision --predictions vision.jsonl

      hf-mel evaluate runs/RERANKER --dataset data/wikimel --candidates cands/test.parquet

      hf-mel evaluate runs/RERANKER --dataset data/wikimel --split validation --candidates name --candidate-weight auto

      accelerate launch -m hf_mel evaluate runs/mimic_flags --dataset data/flags_mel   (the entities shared among processes)
    """
    try:
        k_list = [int(k) for k in ks.split(",")]
    except ValueError:
        k_list = [0]
    if min(k_list) < 1:
        raise typer.BadParameter(f"{ks!r} is not a list of numbers of at least 1, such as 1,5,10.", param_hint="--ks")
    weight: Any = candidate_weight
    if candidate_weight not in (None, "auto"):
        try:
            weight = float(candidate_weight)  # type: ignore[arg-type]
        except ValueError:
            weight = -1.0
        if not 0 <= weight < float("inf"):
            raise typer.BadParameter(
                f"{candidate_weight!r} is neither a number of at least 0 nor auto.", param_hint="--candidate-weight"
            )
    if nil_threshold is not None and nil_from is not None:
        raise typer.BadParameter("Give a threshold or a split to choose it on, not both.", param_hint="--nil-from")

    import torch
    from accelerate import PartialState
    from rich.console import Console

    from hf_mel.candidates.make import load_or_make_candidates
    from hf_mel.data.loading import dataset_version, load_entities, load_mentions
    from hf_mel.data.posts import posts_of
    from hf_mel.errors import RecipeError, UnknownSplitError
    from hf_mel.evaluation.candidate_evaluator import evaluate_candidates
    from hf_mel.evaluation.full_evaluator import check_units, encode_own_entities, evaluate_full
    from hf_mel.evaluation.tables import orders_table, results_table
    from hf_mel.inference.checkpoints import load_linking_model
    from hf_mel.inference.inputs import ModelInputs
    from hf_mel.protocols import Reranker

    if weight == "auto" and split.startswith("test"):
        raise RecipeError(
            f"--candidate-weight auto would choose the weight on {split!r}, by the golds it is then judged by.",
            remedy="Choose it with --split validation, and give that number here.",
        )
    of_split = partial(load_mentions, dataset, revision=dataset_revision, config=config)
    mentions, entities = of_split(split), load_entities(dataset, revision=dataset_revision)
    validation = None if nil_from is None else of_split(nil_from)
    try:
        train_golds = None if split == "train" else set(of_split("train")["entity_id"])
    except UnknownSplitError:
        train_golds = None
    version = dataset_version(dataset, revision=dataset_revision)
    start = time.perf_counter()
    processes = PartialState(cpu=device == "cpu")
    several, first = processes.num_processes > 1, processes.is_main_process
    if several and device is None:
        device = str(processes.device)
    loaded, processor = load_linking_model(
        model, revision=revision, device=device, trust_remote_code=trust_remote_code
    )
    version = {**version, "split": split, **({} if config == "mentions" else {"config": config})}
    console = Console(quiet=not first)
    if isinstance(loaded, Reranker):
        if several:
            raise RecipeError(
                "Several processes share the ranking of all entities.", remedy="Start a reranker in one."
            )
        if candidates is None:
            raise RecipeError(
                f"{model!r} reranks candidates, and none were given.",
                remedy="Give --candidates FILE (from hf-mel candidates), --candidates name, or --candidates retriever "
                "--retriever RUN.",
            )
        if units is not None or nil_threshold is not None or nil_from is not None:
            raise RecipeError("--units and the options of NIL are for retrievers.", remedy="Leave them out.")
        lists = load_or_make_candidates(
            candidates,
            mentions,
            entities,
            of_split,
            k=num_candidates,
            scorer=scorer,
            retriever=retriever,
            device=device,
            posts=partial(posts_of, dataset, posts, revision=dataset_revision, config=config),
        )
        with torch.autocast(getattr(loaded, "device", torch.device("cpu")).type, dtype=torch.bfloat16, enabled=bf16):
            reranked = evaluate_candidates(
                ModelInputs(loaded, processor),
                mentions,
                entities,
                lists.top(num_candidates) if lists.longest > num_candidates else lists,
                joint=joint,
                candidate_weight=weight,
                batch_size=batch_size,
                ks=k_list,
                ties=ties.value,
                train_golds=train_golds,
                data_version=version,
            )
        console.print(results_table(reranked.to_dict()))
        console.print(orders_table(reranked.to_dict()))
        _write(console, reranked.records(), reranked.to_dict(), predictions, output)
        return
    if any(option is not None for option in (candidates, retriever, joint, weight)) or bf16:
        raise RecipeError(
            f"{model!r} ranks all entities.",
            remedy="--candidates, --retriever, --joint, --candidate-weight and --bf16 are for rerankers.",
        )
    unit_list = None if units is None else units.split(",")
    inputs = ModelInputs.from_data(dataset, loaded, processor, posts, revision=dataset_revision, config=config)
    if unit_list is not None:
        check_units(inputs, mentions, entities, unit_list)
    if inputs.prototypes is not None and (num_leaked := inputs.prototypes.num_leaked(mentions)):
        console.print(
            f"The text of {num_leaked:,} of {len(mentions):,} mentions is itself a post about the entity: how they rank says little "
            "about other texts."
        )
    sharing = processes if several else None
    own = encode_own_entities(
        inputs,
        entities,
        processes=sharing,
        batch_size=batch_size,
        progress=first,
    )
    evaluate_on = partial(
        evaluate_full,
        inputs,
        entities=own,
        ks=k_list,
        ties=ties.value,
        units=unit_list,
        batch_size=batch_size,
        processes=sharing,
        progress=first,
    )
    calibration = None
    if validation is not None:
        calibration = evaluate_on(validation, top_k=2).calibrate_nil_threshold()
        nil_threshold = calibration.threshold
    elif nil_threshold is None and units is None:  # a threshold is one of the whole score
        nil_threshold = getattr(loaded.config, "nil_threshold", None)
    result = evaluate_on(
        mentions,
        top_k=top_k,
        train_golds=train_golds,
        nil_threshold=nil_threshold,
        data_version=version,
    )

    results = {**result.to_dict(), "wall_time_seconds": round(time.perf_counter() - start, 3)}
    if calibration is not None:
        results["nil_calibration"] = {"split": nil_from, **asdict(calibration)}
    console.print(results_table(results))
    if first:
        _write(console, result.records(), results, predictions, output)


def _write(console: Any, records: Any, results: dict, predictions: Path | None, output: Path | None) -> None:
    from hf_mel.evaluation.tables import write_records, write_results

    if predictions is not None:
        write_records(records, predictions)
        console.print(f"Candidates of every mention: {predictions}", markup=False)
    if output is not None:
        write_results(results, output)
        console.print(f"Results: {output}", markup=False)
