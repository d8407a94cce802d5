"""`hf-mel evaluate`: evaluates a retriever on the whole knowledge base, or a reranker on candidate lists."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_mel.cli.options import (
    Device,
    MentionConfig,
    NameScorer,
    RetrieverOption,
    Revision,
    Split,
    TrustRemoteCode,
    shared_processes,
)
from hf_mel.evaluation.settings import KS, NUM_CANDIDATES, Ties

if TYPE_CHECKING:
    import datasets
    from accelerate import PartialState
    from rich.console import Console

    from hf_mel.evaluation import FullResult, NilThreshold
    from hf_mel.evaluation.name_weight import NameWeight
    from hf_mel.inference import ModelInputs
    from hf_mel.inference.selective import RiskCoverage

#: Options that are an error if the model ranks candidates, and options that are an error if it ranks all entities.
_ONLY_FOR_ALL = ("units", "nil_threshold", "nil_from", "precision", "name_weight", "save_name_weight")
_ONLY_FOR_CANDIDATES = ("candidates", "retriever", "seed", "joint", "candidate_weight")
#: Options that are an error without a model.
_ONLY_FOR_MODELS = (*_ONLY_FOR_ALL, "joint", "candidate_weight", "bf16", "revision", "trust_remote_code")


def evaluate(
    context: typer.Context,
    dataset: Annotated[str, typer.Option(help="A data-set folder, or a data set on the Hub.")],
    model: Annotated[
        str | None,
        typer.Argument(
            help="A run folder, a model folder, or a model or text encoder on the Hub. Leave it out with --no-model."
        ),
    ] = None,
    no_model: Annotated[
        bool,
        typer.Option(
            "--no-model",
            help="Evaluate the order in which the candidates come, without a model: what search by name, BM25, a prior or a "
            "random namesake reach.",
        ),
    ] = False,
    split: Split = "test",
    config: MentionConfig = "mentions",
    output: Annotated[Path | None, typer.Option(dir_okay=False, help="The JSON file for the results.")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="The .jsonl file for the rank of every mention's gold and its best candidates. With --output, "
            "[b]hf-mel bench compare[/b] can test the results against others.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows encoded or pairs scored at a time.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Retriever: candidates per mention in the predictions.")] = 20,
    ks: Annotated[str, typer.Option(help="Values of k for H@k, separated by commas.")] = ",".join(map(str, KS)),
    ties: Annotated[
        Ties,
        typer.Option(
            help="Rank of a gold among entities with the same score: the mean ([b]realistic[/b]), the best "
            "([b]optimistic[/b]) or the worst ([b]pessimistic[/b]) possible position."
        ),
    ] = "realistic",
    units: Annotated[
        str | None,
        typer.Option(help="Retriever: units of the model whose mean is the score, for instance text,vision."),
    ] = None,
    nil_threshold: Annotated[
        float | None,
        typer.Option(
            help="Retriever: a mention is NIL if its best score is lower. Default: the threshold of the model, if any."
        ),
    ] = None,
    nil_from: Annotated[
        str | None,
        typer.Option(help="Retriever: a split to calibrate the NIL threshold on, for instance validation."),
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            help="Retriever: also report the links that are made at this stated precision, such as [b]0.95[/b]. Its "
            "threshold is that of the split of --nil-from, or else the one that the model stores."
        ),
    ] = None,
    name_weight: Annotated[
        str | None,
        typer.Option(
            help="Retriever: weight of the names. It is multiplied by the similarity of the mention and the best name or "
            "alias of an entity, in \\[0, 1], and added to the score of the model: a number, where 0 adds nothing, or "
            "[b]auto[/b] to choose the best one on the validation split. Default: the weight of the model, if any."
        ),
    ] = None,
    save_name_weight: Annotated[
        bool,
        typer.Option(
            "--save-name-weight",
            help="Retriever: write the weight of the names into the folder of the model, so that [b]hf-mel link[/b] and "
            "all others use it. A NIL threshold and a curve of precision that the model has are calibrated again.",
        ),
    ] = False,
    posts: Annotated[
        str,
        typer.Option(
            help="Posts for a model that represents entities by posts: [b]auto[/b] (those of the data set, or else the "
            "captions of its training split), [b]none[/b], or a split whose captions are the posts."
        ),
    ] = "auto",
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Reranker, --no-model, or a retriever that is to rank these alone: a file that [b]hf-mel candidates[/b] wrote, "
            "or a source: [b]name[/b] (similar names), [b]exact[/b] (equal names), [b]bm25[/b] (words of the mention in the "
            "entity's texts), [b]prior[/b] (counts in the training split), [b]dictionary[/b] (names with all words of the "
            "mention), [b]namesake[/b] (the same in a random order), [b]retriever[/b], [b]release[/b], or several joined by +. "
            "End with [b]+document[/b] to give "
            "mentions without candidates those of their document, or with [b]+shared[/b] to give every mention the first "
            "candidates of the others."
        ),
    ] = None,
    num_candidates: Annotated[
        int, typer.Option(min=1, help="Reranker, or --no-model: maximum number of candidates per mention.")
    ] = NUM_CANDIDATES,
    scorer: NameScorer = "WRatio",
    retriever: RetrieverOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of namesakes (--candidates namesake).")] = 0,
    joint: Annotated[
        bool | None,
        typer.Option(
            "--joint/--no-joint",
            help="Reranker: rank the mentions of a context together. Default: if the model can.",
        ),
    ] = None,
    candidate_weight: Annotated[
        str | None,
        typer.Option(
            help="Reranker: weight of the candidates' own scores, which are added to the reranker's: a number, where 0 "
            "adds nothing, or [b]auto[/b] to choose the best one on the validation split. If several sources give "
            "scores, name one: [b]retriever=2[/b], [b]retriever=auto[/b]."
        ),
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16",
            help="Compute the networks in bfloat16. Scores keep about 3 digits. Only a processor or GPU with native "
            "bfloat16 gets faster, others get slower.",
        ),
    ] = False,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    dataset_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a data set on the Hub.")
    ] = None,
) -> None:
    """Evaluate a model: print H@k, MRR and MR of all mentions and of every stratum.

    A retriever ranks all entities of the knowledge base for every mention. A reranker reorders the candidates of every
    mention. Its results are reported end to end and with the gold added, beside the order of the candidates' own scores.
    With --candidates, a retriever ranks these alone, too, as in papers whose data sets give a list with every mention.

    H@1, H@3 and H@10 are called P@1, R@3 and R@10 in some papers.

    Results are also reported by strata: single mentions and several in a context; names that another entity of the
    knowledge base has too (ambiguous) and other names; and golds that training had (seen) and other golds.

    Examples:

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --split test --output results.json

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --units vision --predictions vision.jsonl

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --split test --precision 0.9
      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --name-weight auto --save-name-weight

      hf-mel evaluate runs/RERANKER --dataset data/wikimel --candidates cands/test.parquet

      hf-mel evaluate runs/imn_tweets --dataset data/tweets_mel --candidates release --ks 1,3

      hf-mel evaluate runs/RERANKER --dataset data/wikimel --split validation --candidates name --candidate-weight auto

      hf-mel evaluate runs/RERANKER --dataset data/wikimel --candidates prior+retriever --retriever runs/RETRIEVER --candidate-weight retriever=2

      hf-mel evaluate --no-model --dataset data/wikimel --candidates bm25

      accelerate launch -m hf_mel evaluate runs/mimic_flags --dataset data/flags_mel   (the processes share the entities)
    """
    k_list = _parse_ks(ks)
    weighted_source, weight = _parse_weight(candidate_weight)
    weight_of_names = _parse_number("--name-weight", name_weight)
    if save_name_weight and weight_of_names is None:
        raise typer.BadParameter("Give the weight to save: --name-weight auto.", param_hint="--save-name-weight")
    if units is not None and weight_of_names:
        raise typer.BadParameter(
            "It applies to the score of all units. Leave it or --units out.", param_hint="--name-weight"
        )
    if nil_threshold is not None and math.isnan(nil_threshold):
        raise typer.BadParameter("nan is no threshold. Give a number.", param_hint="--nil-threshold")
    if precision is not None and not 0 < precision < 1:
        raise typer.BadParameter("A precision is above 0 and below 1, such as 0.95.", param_hint="--precision")
    if precision is not None and (top_k < 2 or units is not None):
        raise typer.BadParameter("Give it with all units and a --top-k of at least 2.", param_hint="--precision")
    if nil_threshold is not None and nil_from is not None:
        raise typer.BadParameter("Give a threshold or a split to choose it on, not both.", param_hint="--nil-from")

    if no_model == (model is not None):
        raise typer.BadParameter("Give a model, or --no-model and no model.", param_hint="MODEL")

    from hf_mel.candidates.lists import missing_candidates_error
    from hf_mel.candidates.make import load_or_make_candidates
    from hf_mel.cli.printing import message_console
    from hf_mel.data.loading import dataset_version, load_entities, load_mentions
    from hf_mel.data.posts import posts_of
    from hf_mel.errors import RecipeError, UnknownSplitError
    from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator
    from hf_mel.evaluation.order_evaluator import OrderEvaluator
    from hf_mel.evaluation.strata import names_by_id
    from hf_mel.evaluation.tables import decision_lines, orders_table, results_table, write_records, write_results
    from hf_mel.files import file_sha256, is_stream
    from hf_mel.hub.saving import change_config
    from hf_mel.inference.checkpoints import load_linking_model
    from hf_mel.inference.inputs import ModelInputs
    from hf_mel.protocols import Reranker
    from hf_mel.training.training_part import part_trained_on

    if weight == "auto" and split.startswith("test"):
        raise RecipeError(
            f"--candidate-weight auto would choose the weight on {split!r}, the split it is evaluated on.",
            remedy="Choose it with --split validation, and give that number here.",
        )
    load_split = partial(load_mentions, dataset, revision=dataset_revision, config=config)
    mentions, entities = load_split(split), load_entities(dataset, revision=dataset_revision)
    nil_mentions = None if nil_from is None else load_split(nil_from)
    try:
        train_golds = None
        if split != "train":
            training = load_split("train")
            training = training if model is None else part_trained_on(model, training)
            train_golds = set(training["entity_id"])
    except UnknownSplitError:
        train_golds = None
    version = dataset_version(dataset, revision=dataset_revision)
    start = time.perf_counter()
    processes, device = shared_processes(device)
    loaded: Any = None
    processor: Any = None
    if model is not None:
        loaded, processor = load_linking_model(
            model, revision=revision, device=device, trust_remote_code=trust_remote_code
        )
    console = message_console(output, predictions, quiet=not processes.is_main_process)
    settings: dict[str, Any] = {"ks": k_list, "ties": ties, "batch_size": batch_size}
    split_settings: dict[str, Any] = {
        "train_golds": train_golds,
        "data_version": {**version, "split": split, **({} if config == "mentions" else {"config": config})},
    }
    is_reranker = isinstance(loaded, Reranker)
    lists = None
    if model is None and (options := _given(context, _ONLY_FOR_MODELS)):
        raise RecipeError(f"Without a model, {options} mean nothing.", remedy="Leave them out, or give a model.")
    if model is None or is_reranker or candidates is not None:
        if model is not None:
            _check_options(context, model, is_reranker, ranks_all=False)
        if processes.num_processes > 1:
            raise RecipeError(
                "Only a retriever that ranks all entities can be evaluated by several processes.",
                remedy="Start one process.",
            )
        if candidates is None:
            remedy = (
                "Give --candidates FILE (from hf-mel candidates), --candidates name, or --candidates retriever "
                "--retriever RUN."
            )
            if model is None:
                raise RecipeError(
                    "Without a model, the order of candidates is evaluated, but none were given.", remedy=remedy
                )
            raise missing_candidates_error(repr(model), remedy)
        lists = load_or_make_candidates(
            candidates,
            mentions,
            entities,
            load_split,
            k=num_candidates,
            scorer=scorer,
            retriever=retriever,
            device=device,
            posts=partial(posts_of, dataset, posts, revision=dataset_revision, config=config),
            seed=seed,
        )
    if model is None:
        assert lists is not None
        ordered = OrderEvaluator(entities, **settings, **split_settings)(mentions, lists)
        results, records = ordered.to_dict(), ordered.records()
    elif lists is not None:
        evaluator = CandidateEvaluator(
            entities,
            joint=joint,
            candidate_weight=weight,
            candidate_source=weighted_source,
            **settings,
            **split_settings,
        )
        inputs = ModelInputs.from_data(dataset, loaded, processor, posts, revision=dataset_revision, config=config)
        _print_leaked(inputs, mentions, console)
        with _in_bf16(loaded, bf16, console):
            reranked = evaluator(inputs, mentions, lists)
        results, records = reranked.to_dict(), reranked.records()
    else:
        _check_options(context, model, is_reranker, ranks_all=True)
        if save_name_weight and not Path(model, "config.json").is_file():
            raise RecipeError(
                f"{model!r} is no folder of a model that a weight could be saved in.",
                remedy="Download it into a folder, or give --name-weight to every command.",
            )
        inputs = ModelInputs.from_data(dataset, loaded, processor, posts, revision=dataset_revision, config=config)
        curve = None if precision is None or nil_from is not None else _stored_curve(loaded, model)
        with _in_bf16(loaded, bf16, console):
            ranked, calibration, calibrated_on, chosen_weight = _evaluate_retriever(
                inputs,
                mentions,
                entities,
                settings={**settings, "units": None if units is None else units.split(",")},
                split_settings={**split_settings, "top_k": top_k, "entity_names": names_by_id(entities)},
                nil_threshold=nil_threshold,
                nil_mentions=nil_mentions,
                name_weight=weight_of_names,
                validation=load_split("validation") if weight_of_names == "auto" or save_name_weight else None,
                processes=processes,
                console=console,
            )
        results, records = ranked.to_dict(), ranked.records()
        results["wall_time_seconds"] = round(time.perf_counter() - start, 3)
        if calibration is not None:
            results["nil_calibration"] = {"split": nil_from or "validation", **asdict(calibration)}
        threshold = ranked.setting["nil_threshold"]
        if detection := ranked.nil_detection(train_golds):
            results["nil_detection"] = detection
        if chosen_weight is not None:
            results["chosen_name_weight"] = {"split": "validation", **asdict(chosen_weight)}
        new_curve = None if calibrated_on is None else calibrated_on.risk_coverage(threshold)
        if precision is not None:
            curve = curve if new_curve is None else new_curve
            assert curve is not None
            results["at_precision"] = ranked.at_precision(precision, curve, threshold)
        if save_name_weight and processes.is_main_process:
            changes: dict[str, Any] = {"name_weight": ranked.setting["name_weight"]}
            if calibration is not None and getattr(loaded.config, "nil_threshold", None) is not None:
                changes["nil_threshold"] = calibration.threshold
            if new_curve is not None and getattr(loaded.config, "link_calibration", None) is not None:
                changes["link_calibration"] = asdict(new_curve)
            change_config(model, **changes)
            console.print(f"The weight of the names is saved in {model}.", markup=False)
    console.print(results_table(results))
    for line in decision_lines(results):
        console.print(line, markup=False)
    if bf16:
        results["bf16"] = True
    if "orders" in results:
        console.print(orders_table(results))
    if processes.is_main_process and predictions is not None:
        write_records(records, predictions)
        if output is not None and not is_stream(predictions) and not is_stream(output):
            file = os.path.relpath(predictions.resolve(), output.resolve().parent)
            results["predictions"] = {"file": file, "sha256": file_sha256(predictions)}
        console.print(f"Candidates of every mention: {predictions}", markup=False)
    if processes.is_main_process and output is not None:
        write_results(results, output)
        console.print(f"Results: {output}", markup=False)


def _parse_ks(ks: str) -> list[int]:
    try:
        values = [int(k) for k in ks.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise typer.BadParameter(f"{ks!r} is not a list of numbers of at least 1, such as 1,5,10.", param_hint="--ks")
    return values


def _parse_weight(option: str | None) -> tuple[str | None, float | Literal["auto"] | None]:
    """Returns the source, if one is named, and the weight of `--candidate-weight`."""
    if option is None:
        return None, None
    source, named, weight = option.rpartition("=")
    if named and not source:
        raise typer.BadParameter(f"{option!r} names no source before '='.", param_hint="--candidate-weight")
    return source or None, _parse_number("--candidate-weight", weight)


def _parse_number(name: str, option: str | None) -> float | Literal["auto"] | None:
    """Returns the value of an option that is a number of at least 0, "auto", or not given."""
    if option is None or option == "auto":
        return option  # type: ignore[return-value]
    try:
        value = float(option)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{option!r} is neither a number of at least 0 nor auto.", param_hint=name)
    return value


def _given(context: typer.Context, names: Sequence[str]) -> str:
    """Returns the options of these names that the command line has, joined by "and"."""
    source_of = context.get_parameter_source
    given = [name for name in names if getattr(source_of(name), "name", "DEFAULT") != "DEFAULT"]
    return " and ".join("--" + name.replace("_", "-") for name in given)


def _check_options(context: typer.Context, model: str, is_reranker: bool, ranks_all: bool) -> None:
    """Raises a RecipeError for an option that does not apply to what the model ranks."""
    from hf_mel.errors import RecipeError

    other: tuple[str, ...] = _ONLY_FOR_CANDIDATES if ranks_all else _ONLY_FOR_ALL
    if not is_reranker and not ranks_all:
        other = (*other, "joint")
    if options := _given(context, other):
        if ranks_all:
            task, remedy = "ranks all entities", "Leave out options for rerankers, or give --candidates."
        else:
            task, remedy = "reranks candidates", "Leave out options for retrievers."
            if not is_reranker:
                task, remedy = "ranks the candidates alone", "Leave it out, or leave out --candidates."
        raise RecipeError(f"{model!r} {task} and cannot use {options}.", remedy=remedy)


def _evaluate_retriever(
    inputs: ModelInputs,
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    *,
    settings: dict[str, Any],
    split_settings: dict[str, Any],
    nil_threshold: float | None,
    nil_mentions: datasets.Dataset | None,
    name_weight: float | Literal["auto"] | None,
    validation: datasets.Dataset | None,
    processes: PartialState,
    console: Console,
) -> tuple[FullResult, NilThreshold | None, FullResult | None, NameWeight | None]:
    """Evaluates a retriever, and first chooses the weight of the names and the NIL threshold if there are mentions for it.

    Returns the result, the calibration, the result of the mentions for it, and the chosen weight.

    Args:
        inputs, mentions, entities: The retriever and the data.
        settings: Settings of [`FullEvaluator`] for both evaluations.
        split_settings: Its other settings for the evaluation of `mentions`.
        nil_threshold: Threshold from the command line.
        nil_mentions: Mentions to calibrate the threshold on.
        name_weight: Weight of the names from the command line.
        validation: Mentions to choose it on, and to calibrate again what the model has stored.
        processes: Processes that share the entities.
        console: Console for messages.
    """
    from hf_mel.candidates.name_index import name_weight_of
    from hf_mel.errors import RecipeError
    from hf_mel.evaluation.full_evaluator import FullEvaluator, check_units, encode_entities
    from hf_mel.evaluation.name_weight import choose_name_weight

    settings = {**settings, "progress": processes.is_main_process}
    if settings["units"] is not None:
        check_units(inputs, mentions, entities, settings["units"])
    _print_leaked(inputs, mentions, console)
    sharing = processes if processes.num_processes > 1 else None
    encoded = encode_entities(
        inputs,
        entities,
        processes=sharing,
        batch_size=settings["batch_size"],
        progress=settings["progress"],
    )
    chosen = None
    if name_weight == "auto":
        assert validation is not None
        if sharing is not None:
            raise RecipeError("One process chooses the weight of the names.", remedy="Start one, or give a number.")
        names = FullEvaluator(encoded, entity_names=split_settings["entity_names"]).name_index()
        chosen = choose_name_weight(
            inputs, validation, encoded, names, batch_size=settings["batch_size"], progress=settings["progress"]
        )
        console.print(f"Weight of the names, chosen on validation: {chosen.weight:g}", markup=False)
        name_weight = chosen.weight
    if settings["units"] is None:
        settings["name_weight"] = name_weight_of(inputs.model, name_weight)
    calibration = calibrated_on = None
    stored = [getattr(inputs.model.config, name, None) for name in ("nil_threshold", "link_calibration")]
    finds_threshold = nil_mentions is not None or (validation is not None and stored[0] is not None)
    if nil_threshold is None and nil_mentions is None and any(value is not None for value in stored):
        nil_mentions = validation  # what the model has stored was calibrated on other scores
    if nil_mentions is not None:
        calibrator = FullEvaluator(encoded, top_k=2, entity_names=split_settings["entity_names"], **settings)
        calibrated_on = calibrator(inputs, nil_mentions, processes=sharing)
    if calibrated_on is not None and finds_threshold:
        calibration = calibrated_on.calibrate_nil_threshold()
        nil_threshold = calibration.threshold
    elif (
        nil_threshold is None and settings["units"] is None
    ):  # the model's threshold applies to the score of all units
        nil_threshold = getattr(inputs.model.config, "nil_threshold", None)
    evaluator = FullEvaluator(encoded, nil_threshold=nil_threshold, **settings, **split_settings)
    return evaluator(inputs, mentions, processes=sharing), calibration, calibrated_on, chosen


def _print_leaked(inputs: ModelInputs, mentions: datasets.Dataset, console: Console) -> None:
    """Prints how many mentions have the text of a post about their gold, for a model that reads posts."""
    if inputs.prototypes is not None and (num_leaked := inputs.prototypes.num_leaked(mentions)):
        console.print(
            f"The text of {num_leaked:,} of {len(mentions):,} mentions is also a post about their gold entity. Results "
            "on these mentions do not carry over to other texts."
        )


def _stored_curve(loaded: Any, model: str) -> RiskCoverage:
    """Returns the risk–coverage curve that a retriever stores."""
    from hf_mel.errors import CalibrationError
    from hf_mel.inference.selective import RiskCoverage

    content = getattr(loaded.config, "link_calibration", None)
    if content is None:
        raise CalibrationError(
            f"{model!r} stores no calibration of its links (config.link_calibration).",
            remedy="Calibrate them on a split: --nil-from validation.",
        )
    return RiskCoverage.from_dict(content)


@contextmanager
def _in_bf16(model: Any, bf16: bool, console: Console) -> Iterator[None]:
    """Lets the networks of a model compute in bfloat16, if asked for. Scores of encodings are computed in float32."""
    import torch

    from hf_mel.inference.execution import model_device
    from hf_mel.inference.precision import native_bf16

    device_type = model_device(model).type
    if bf16:
        is_native, reason = native_bf16(device_type)
        if not is_native:
            console.print(f"--bf16 is slower than float32 here: {reason}.")
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=bf16):
        yield
