"""Cards of models and knowledge bases, rendered from what a run or a knowledge base has recorded."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from hf_mel.building.markdown import markdown_table

#: Last line of a rendered card. Publishing writes the card again only if it finds this line.
MARKER = "<!-- Written by hf_mel from results.json. Take this line out to keep what you change by hand. -->"

_METRICS = (("hits@1", "H@1"), ("hits@3", "H@3"), ("hits@5", "H@5"), ("hits@10", "H@10"), ("mrr", "MRR"), ("mr", "MR"))

#: Extra lines in the example of a post-based model: every entity gets one post, its own description.
_PROTOTYPES_EXAMPLE = """\
descriptions = [{"text": f"{row['name']}. {row['attributes']}", "image": None} for row in entities]
with torch.no_grad():
    posts = model.encode_posts(**processor(posts=descriptions))  # one post per entity
modalities = [name for name in posts if f"{name}_present" in posts]
for k, row in enumerate(entities):
    vectors = {name: posts[name][[k]][posts[f"{name}_present"][[k]]] for name in modalities}
    row["prototypes"] = {name: torch.nn.functional.normalize(rows, dim=-1) for name, rows in vectors.items()}
"""


def model_card(run_info: Mapping[str, Any]) -> str:
    """Returns the README.md of a trained model: Hub metadata, use, data, results, training, limits and citation.

    Args:
        run_info (mapping): The content of a run folder's `results.json` (see [`~hf_mel.training.run.run_recipe`]). A
            pre-training run and a reranker have cards of their own. Two keys are optional: `repo_id`, the repository of
            the model (default: `hf-mel/` and the recipe's name), and `tests`, a list of evaluations of the finished model
            ([`~hf_mel.evaluation.full_evaluator.FullResult.to_dict`]).

    Returns:
        `str`: The card; its last line is [`MARKER`].
    """
    model, data, recipe = run_info["model"], run_info["data"], run_info["recipe"]
    bases = [name for name in (model.get("from_pretrained"), model.get("text"), model.get("vision")) if name]
    hub_bases = list(dict.fromkeys(name for name in bases if _is_hub_id(name)))
    metadata = ModelCardData(
        license=run_info["license"],
        library_name="transformers",
        tags=["entity-linking", "multimodal", "hf_mel", model["type"]],
        datasets=[data["dataset"]] if data.get("revision") and _is_hub_id(data["dataset"]) else None,
        base_model=hub_bases or None,
    )
    validation = run_info["validation"] or {}  # none with final_evaluation: false
    candidates = validation.get("candidates") or run_info.get("candidates")
    pretraining = _is_pretraining(run_info)
    if pretraining:
        body = _template("pretraining_card.md")
    else:
        body = _template("model_card.md" if candidates is None else "reranker_card.md")
    # A card's own limits come first in the common section on limits.
    body, _, limits = body.partition("## Limits and bias\n")
    citation = run_info.get("citation", "").strip()
    text = string.Template(body + _template("common_sections.md")).substitute(
        name=recipe,
        repo_id=run_info.get("repo_id") or f"hf-mel/{recipe}",
        description=run_info.get("description", ""),
        model_type=model["type"],
        parameters=f"{model['parameters']:,}",
        base=f"built on {' and '.join(f'`{name}`' for name in bases)}" if bases else "trained from scratch",
        prototypes=_PROTOTYPES_EXAMPLE if model.get("posts") else "",
        data=_data_table(data),
        kb_size=f"{data['entities']:,}",
        results=_loss_sentence(run_info) if pretraining else _results_section(run_info),
        nil="\n\n".join(
            filter(None, (_nil_sentence(run_info.get("nil")), _risk_coverage(run_info.get("risk_coverage"))))
        ),
        candidates="" if candidates is None else _candidates_phrase(candidates),
        orders=_orders_table(validation) if validation and candidates is not None else "",
        training=markdown_table(["argument", "value"], _public_arguments(run_info["training"])),
        run=_run_sentence(run_info),
        purpose="Training models that suggest" if pretraining else "Suggesting",
        limits=limits.strip(),
        citation=f"The method:\n\n```bibtex\n{citation}\n```" if citation else "",
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{_collapse_blank_lines(text)}\n\n{MARKER}\n"


def eval_results(run_info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the content of `.eval_results/*.yaml`, which the Hub shows beside a model: H@1 and MRR of every evaluation.

    Args:
        run_info (mapping): As in [`model_card`].

    Returns:
        `list[dict]`: The entries; empty unless the data set is a commit of a repository on the Hub.
    """
    data = run_info["data"]
    if not data.get("revision") or not _is_hub_id(data["dataset"]):
        return []
    entries = []
    for split, evaluation in evaluations(run_info):
        metrics = evaluation["metrics"]
        if candidates := evaluation.get("candidates"):
            ranked = f"{_candidates_phrase(candidates)} reranked, end to end"
        else:
            ranked = f"all {data['entities']:,} entities ranked"
        for metric, title in (("hits@1", "H@1"), ("mrr", "MRR")):
            if metrics.get(metric) is not None:
                entries.append(
                    {
                        "dataset": {
                            "id": data["dataset"],
                            "task_id": f"{split}_{metric.replace('@', '_at_')}",
                            "revision": data["revision"],
                        },
                        "value": round(100 * metrics[metric], 2),
                        "notes": (
                            f"{title} in per cent over {metrics['num_ranked']:,} mentions of {split}, {ranked}, "
                            f"ties {evaluation.get('ties', 'realistic')}"
                        ),
                    }
                )
    return entries


def kb_card(info: Mapping[str, Any], repo_id: str) -> str:
    """Returns the README.md of a knowledge base's repository.

    Args:
        info (mapping): [`~hf_mel.kb.knowledge_base.KnowledgeBase.info`].
        repo_id (`str`): Repository id, `OWNER/NAME`.
    """
    model = info["model"]
    model_id = model["name"] if _is_hub_id(model["name"]) else None
    metadata = DatasetCardData(
        tags=["entity-linking", "multimodal", "knowledge-base", "hf_mel", model["type"]],
        configs=[{"config_name": "default", "data_files": [{"split": "kb", "path": "entities-*.parquet"}]}],
    )
    encodings = (
        [f"`{name}`", f"{' × '.join(map(str, spec['shape'])) or '1'} {spec['dtype']}"]
        for name, spec in info["encodings"].items()
    )
    body = string.Template(_template("kb_card.md")).substitute(
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        entities=f"{info['entities']:,}",
        model=f"[`{model_id}`](https://huggingface.co/{model_id})" if model_id else f"`{model['name']}`",
        model_id=model_id or "MODEL",
        model_type=model["type"],
        revision=f", revision `{model['revision']}`" if model["revision"] else "",
        weights=model["weights"],
        dtype=info["dtype"],
        encodings=markdown_table(["encoding", "per entity"], encodings),
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{_collapse_blank_lines(body)}\n"


def evaluations(run_info: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (split, evaluation): the tests, then validation; nothing for a pre-training run, which ranks nothing."""
    if _is_pretraining(run_info):
        return
    for test in run_info.get("tests", ()):
        yield str((test.get("data") or {}).get("split", "test")), test
    if run_info["validation"] is not None:
        yield run_info["data"]["validation_split"], run_info["validation"]


def _template(name: str) -> str:
    return (resources.files("hf_mel.hub") / "templates" / name).read_text(encoding="utf-8")


def _collapse_blank_lines(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(("./", "../"))


def _is_pretraining(run_info: Mapping[str, Any]) -> bool:
    return run_info.get("task") == "pretraining"


def _data_table(data: Mapping[str, Any]) -> str:
    kind = "mentions" if "train_mentions" in data else "posts"  # pre-training reads posts
    rows = [
        ["data set", f"`{data['dataset']}`"],
        ["revision", f"`{data['revision']}`" if data.get("revision") else "a local build"],
        ["sha256 of its files", f"`{data['sha256']}`" if data.get("sha256") else "unknown"],
        [f"{kind} for training (`{data['train_split']}`)", f"{data[f'train_{kind}']:,}"],
        [f"{kind} for validation (`{data['validation_split']}`)", f"{data[f'validation_{kind}']:,}"],
        ["entities of the knowledge base", f"{data['entities']:,}"],
    ]
    for extra in data.get("extra_datasets", ()):
        rows.insert(3, ["further data set for training", f"`{extra['dataset']}`, sha256 `{extra['sha256']}`"])
    if data.get("train_nil"):
        role = "from which NIL is learned" if data.get("nil_is_learned") else "left out because their entity is NIL"
        rows.insert(-2, [f"training mentions {role}", f"{data['train_nil']:,}"])
    return markdown_table(["", ""], rows)


def _loss_sentence(run_info: Mapping[str, Any]) -> str:
    loss, split = run_info["validation"]["loss"], run_info["data"]["validation_split"]
    return f"The loss on `{split}` is {loss:.4g}. The checkpoint was selected by this loss."


def _results_section(run_info: Mapping[str, Any]) -> str:
    selected_on = run_info["data"]["validation_split"]
    parts = []
    for split, evaluation in evaluations(run_info):
        if split == selected_on:
            parts.append(f"The checkpoint was selected by MRR on `{split}`, so these results are slightly optimistic.")
        parts.append(_results_table(evaluation, split))
    if run_info["validation"] is None:
        parts.append(f"The finished model was not evaluated on `{selected_on}`.")
    return "\n\n".join(parts)


def _results_table(evaluation: Mapping[str, Any], split: str) -> str:
    """A row for all mentions, then one for every stratum."""
    lines = [(f"`{split}`", evaluation["metrics"])]
    for stratum, groups in evaluation.get("strata", {}).items():
        lines += [(f"{stratum}: {group}", metrics) for group, metrics in groups.items()]
    columns = [(key, title) for key, title in _METRICS if key in evaluation["metrics"]]
    rows = [
        [label, f"{metrics['num_ranked']:,}", *(_format_metric(key, metrics.get(key)) for key, _ in columns)]
        for label, metrics in lines
    ]
    return markdown_table(["mentions", "number", *(title for _, title in columns)], rows)


def _candidates_phrase(candidates: Mapping[str, Any]) -> str:
    k, source = candidates["k"], candidates.get("source", "an unknown source")
    if "recall" not in candidates:
        return f"up to {k} by {source}"
    recall = _format_metric("recall", candidates["recall"][f"recall@{k}"])
    return f"up to {k} by {source}, with {recall} % of the golds"


def _orders_table(evaluation: Mapping[str, Any]) -> str:
    columns = [(key, title) for key, title in _METRICS if key in evaluation["metrics"]]
    rows = [
        [f"{order}, {label}", *(_format_metric(key, result["metrics"].get(key)) for key, _ in columns)]
        for label, protocol in (("end to end", evaluation), ("gold added", evaluation["gold_added"]))
        for order, result in protocol["orders"].items()
    ]
    return markdown_table(["order", *(title for _, title in columns)], rows)


def _format_metric(key: str, value: float | None) -> str:
    if value is None or value != value:  # nan: a stratum of NIL mentions has nothing to rank
        return ""
    return f"{value:.1f}" if key == "mr" else f"{100 * value:.1f}"


def _nil_sentence(nil: Mapping[str, Any] | None) -> str:
    if not nil:
        return ""
    if nil["simulated"]:
        return (
            "All mentions of this split are in the knowledge base, so the model predicts no NIL by default. In a simulation "
            "that removes the gold entity of every mention once, a threshold of "
            f"{nil['threshold']:.4g} decides {100 * nil['accuracy']:.1f} % correctly "
            f"(`--nil-threshold {nil['threshold']:.4g}`)."
        )
    best = ", for the best F1 of NIL" if nil.get("objective") == "f1" else ""
    return (
        f"A mention is predicted as NIL if its best score is below {nil['threshold']:.4g} (`config.nil_threshold`). The "
        f"threshold was calibrated on the NIL mentions of this split{best}, where it decides "
        f"{100 * nil['accuracy']:.1f} % correctly."
    )


def _risk_coverage(curve: Mapping[str, Any] | None) -> str:
    """Returns the risk–coverage curve of the validation split as a table, from the surest links to all."""
    if not curve or not curve["links"]:
        return ""
    points = list(zip(curve["links"], curve["wrong"], curve["confidences"], strict=True))
    # About ten rows: the points nearest to 10 %, 20 % … of all links.
    wanted = [points[-1][0] * tenth / 10 for tenth in range(1, 11)]
    chosen = dict.fromkeys(min(points, key=lambda point, links=share: abs(point[0] - links)) for share in wanted)  # type: ignore[misc]
    rows = [
        [f"{100 * links / curve['mentions']:.0f} %", f"{confidence:.3g}", f"{100 * (1 - wrong / links):.1f}"]
        for links, wrong, confidence in chosen
    ]
    return (
        "Risk and coverage on this split: if only the surest links are made, more of them are right. `--precision 0.9` of "
        "`hf-mel link` takes the threshold that this curve shows for a precision, and leaves the other links for review.\n\n"
        + markdown_table(["mentions linked", "least confidence", "precision"], rows)
    )


def _public_arguments(training: Mapping[str, Any]) -> Iterator[list[str]]:
    for key, value in training.items():
        if not key.endswith("token"):  # hub_token and the like are secrets
            yield [f"`{key}`", f"`{value}`"]


def _run_sentence(info: Mapping[str, Any]) -> str:
    run, versions = info["run"], ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    best = f"epoch {info['best']['epoch']:g} was the best" if info.get("best") else "the last step was kept"
    minutes = run["seconds"] / 60
    resumed = " since it was last resumed" if run["resumed"] else ""
    return f"{minutes:.1f} minutes on {run['device']}{resumed}; {best}; seed {info['seed']}. With {versions}."
