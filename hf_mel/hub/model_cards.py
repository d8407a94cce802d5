"""The cards of repositories, written from what a run or a knowledge base recorded."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

#: The last line of a card that publishing may write anew.
MARKER = "<!-- Written by hf_mel from results.json. Take this line out to keep what you change by hand. -->"

_METRICS = (("hits@1", "H@1"), ("hits@3", "H@3"), ("hits@5", "H@5"), ("hits@10", "H@10"), ("mrr", "MRR"), ("mr", "MR"))

#: In the example of a card: what a model that knows entities by posts needs of them.
_PROTOTYPES = """\
own = [{"text": f"{row['name']}. {row['attributes']}", "image": None} for row in entities]  # the only posts, about themselves
with torch.no_grad():
    posts = model.encode_posts(**processor(posts=own))
for k, row in enumerate(entities):
    known = {name: (posts[name], posts[f"{name}_present"]) for name in posts if f"{name}_present" in posts}
    row["prototypes"] = {
        name: torch.nn.functional.normalize(vectors[[k]][there[[k]]], dim=-1) for name, (vectors, there) in known.items()
    }
"""


def model_card(run_info: Mapping[str, Any]) -> str:
    """The README.md of a trained model: Hub metadata, use, data, results, training, limits, citation.

    Args:
        run_info (mapping): What `results.json` of a run folder holds (see [`~hf_mel.training.run.run_recipe`]; of a
            pre-training too, which has a card of its own), and optionally `repo_id`, the repository the model goes to; default: the recipe's name under `hf-mel/`; and
            `tests`, a list of evaluations of the finished model ([`~hf_mel.evaluation.full_evaluator.FullResult.to_dict`]).
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
    lists = run_info["validation"].get("candidates")
    pretraining = _is_pretraining(run_info)
    name = "pretraining_card.md" if pretraining else "model_card.md" if lists is None else "reranker_card.md"
    template = string.Template((resources.files("hf_mel.hub") / "templates" / name).read_text(encoding="utf-8"))
    citation = run_info.get("citation", "").strip()
    body = template.substitute(
        name=recipe,
        repo_id=run_info.get("repo_id") or f"hf-mel/{recipe}",
        description=run_info.get("description", ""),
        model_type=model["type"],
        parameters=f"{model['parameters']:,}",
        base=f"built on {' and '.join(f'`{name}`' for name in bases)}" if bases else "started from scratch",
        prototypes=_PROTOTYPES if model.get("posts") else "",
        data=_data(data),
        kb_size=f"{data['entities']:,}",
        results=_loss(run_info) if pretraining else _all_results(run_info),
        nil=_nil(run_info.get("nil")),
        candidates="" if lists is None else _candidates(lists),
        orders="" if lists is None else _orders(run_info["validation"]),
        training=_table(["argument", "value"], _shown(run_info["training"])),
        run=_run(run_info),
        citation=f"The method:\n\n```bibtex\n{citation}\n```" if citation else "",
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{_squeezed(body)}\n\n{MARKER}\n"


def eval_results(run_info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content of `.eval_results/*.yaml`, which the Hub shows beside a model: H@1 and MRR of each evaluation.

    Args:
        run_info (mapping): As in [`model_card`]; without a data set on the Hub, by its commit, there is nothing to name.
    """
    data = run_info["data"]
    if not data.get("revision") or not _is_hub_id(data["dataset"]):
        return []
    entries = []
    for split, evaluation in evaluations(run_info):
        metrics = evaluation["metrics"]
        for metric, title in (("hits@1", "H@1"), ("mrr", "MRR")):
            if metrics.get(metric) is not None:
                ranked = f"every one of {data['entities']:,} entities ranked"
                if lists := evaluation.get("candidates"):
                    ranked = f"{_candidates(lists)} reranked, end to end"
                notes = (
                    f"{title} in per cent over {metrics['num_ranked']:,} mentions of {split}, {ranked}, "
                    f"ties {evaluation.get('ties', 'realistic')}"
                )
                entries.append(
                    {
                        "dataset": {
                            "id": data["dataset"],
                            "task_id": f"{split}_{metric.replace('@', '_at_')}",
                            "revision": data["revision"],
                        },
                        "value": round(100 * metrics[metric], 2),
                        "notes": notes,
                    }
                )
    return entries


def kb_card(info: Mapping[str, Any], repo_id: str) -> str:
    """The README.md of a knowledge base's repository.

    Args:
        info (mapping): [`~hf_mel.kb.knowledge_base.KnowledgeBase.info`].
        repo_id (`str`): Where it goes.
    """
    model = info["model"]
    known = model["name"] if _is_hub_id(model["name"]) else None
    metadata = DatasetCardData(
        tags=["entity-linking", "multimodal", "knowledge-base", "hf_mel", model["type"]],
        configs=[{"config_name": "default", "data_files": [{"split": "kb", "path": "entities-*.parquet"}]}],
    )
    encodings = (
        [f"`{name}`", f"{' × '.join(map(str, spec['shape'])) or '1'} {spec['dtype']}"]
        for name, spec in info["encodings"].items()
    )
    template = string.Template((resources.files("hf_mel.hub") / "templates/kb_card.md").read_text(encoding="utf-8"))
    body = template.substitute(
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        entities=f"{info['entities']:,}",
        model=f"[`{known}`](https://huggingface.co/{known})" if known else f"`{model['name']}`",
        model_id=known or "MODEL",
        model_type=model["type"],
        revision=f", revision `{model['revision']}`" if model["revision"] else "",
        weights=model["weights"],
        dtype=info["dtype"],
        encodings=_table(["encoding", "per entity"], encodings),
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{_squeezed(body)}\n"


def _squeezed(body: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", body).strip()


def evaluations(run_info: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(split, evaluation): the tests, then validation; nothing for a pre-training, which has a loss and no ranks."""
    if _is_pretraining(run_info):
        return
    for test in run_info.get("tests", ()):
        yield str((test.get("data") or {}).get("split", "test")), test
    yield run_info["data"]["validation_split"], run_info["validation"]


def _is_pretraining(run_info: Mapping[str, Any]) -> bool:
    return run_info.get("task") == "pretraining"


def _loss(run_info: Mapping[str, Any]) -> str:
    loss, split = run_info["validation"]["loss"], run_info["data"]["validation_split"]
    return f"The loss on `{split}` is {loss:.4g}; the checkpoint was chosen by it."


def _all_results(run_info: Mapping[str, Any]) -> str:
    chosen_on = run_info["data"]["validation_split"]
    parts = []
    for split, evaluation in evaluations(run_info):
        note = (
            ""
            if split != chosen_on
            else f"The checkpoint was chosen by MRR on `{split}`, so other splits are a little harder.\n\n"
        )
        parts.append(note + _results(evaluation, split))
    return "\n\n".join(parts)


def _candidates(lists: Mapping[str, Any]) -> str:
    recall = lists["recall"][f"recall@{lists['k']}"]
    return (
        f"up to {lists['k']} by {lists.get('source', 'an unknown source')}, with {_number('', recall)} % of the golds"
    )


def _orders(evaluation: Mapping[str, Any]) -> str:
    rows = []
    for label, of_protocol in (("end to end", evaluation), ("gold added", evaluation["gold_added"])):
        for order, found in of_protocol["orders"].items():
            shown = [(key, title) for key, title in _METRICS if key in found["metrics"]]
            rows.append([f"{order}, {label}", *(_number(key, found["metrics"][key]) for key, _ in shown)])
    return _table(["order", *(title for _, title in shown)], rows)


def _shown(training: Mapping[str, Any]) -> Iterator[list[str]]:
    for key, value in training.items():
        if not key.endswith("token"):  # hub_token and the like are secrets
            yield [f"`{key}`", f"`{value}`"]


def _data(data: Mapping[str, Any]) -> str:
    kind = "mentions" if "train_mentions" in data else "posts"  # a pre-training's
    rows = [
        ["data set", f"`{data['dataset']}`"],
        ["revision", f"`{data['revision']}`" if data.get("revision") else "a local build"],
        ["sha256 of its files", f"`{data['sha256']}`" if data.get("sha256") else "not known"],
        [f"{kind} for training (`{data['train_split']}`)", f"{data[f'train_{kind}']:,}"],
        [f"{kind} for validation (`{data['validation_split']}`)", f"{data[f'validation_{kind}']:,}"],
        ["entities of the knowledge base", f"{data['entities']:,}"],
    ]
    if data.get("train_nil"):
        rows.insert(4, ["of these left out, because their entity is NIL", f"{data['train_nil']:,}"])
    return _table(["", ""], rows)


def _results(evaluation: Mapping[str, Any], split: str) -> str:
    """One line for all mentions, and one for each stratum."""
    lines = [(f"`{split}`", evaluation["metrics"])]
    for stratum, groups in evaluation.get("strata", {}).items():
        lines += [(f"{stratum}: {group}", metrics) for group, metrics in groups.items()]
    shown = [(key, title) for key, title in _METRICS if key in evaluation["metrics"]]
    rows = [
        [label, f"{metrics['num_ranked']:,}", *(_number(key, metrics.get(key)) for key, _ in shown)]
        for label, metrics in lines
    ]
    return _table(["mentions", "number", *(title for _, title in shown)], rows)


def _number(key: str, value: float | None) -> str:
    if value is None or value != value:  # nan: a stratum of NIL mentions has nothing to rank
        return ""
    return f"{value:.1f}" if key == "mr" else f"{100 * value:.1f}"


def _nil(nil: Mapping[str, Any] | None) -> str:
    if not nil:
        return ""
    if nil["simulated"]:
        return (
            "Every mention of this split is in the knowledge base, so nothing is taken for NIL by default. With every gold "
            f"left out once, a threshold of {nil['threshold']:.4g} would decide {100 * nil['accuracy']:.1f} % right "
            f"(`--nil-threshold {nil['threshold']:.4g}`)."
        )
    return (
        f"A mention whose best score is below {nil['threshold']:.4g} is taken for NIL (`config.nil_threshold`); set on "
        f"the NIL mentions of this split, where {100 * nil['accuracy']:.1f} % of the decisions are right."
    )


def _run(info: Mapping[str, Any]) -> str:
    run, versions = info["run"], ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    best = f"epoch {info['best']['epoch']:g} was the best" if info.get("best") else "the last step was kept"
    minutes = run["seconds"] / 60
    resumed = " since it was last resumed" if run["resumed"] else ""
    return f"{minutes:.1f} minutes on {run['device']}{resumed}; {best}; seed {info['seed']}. With {versions}."


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(("./", "../"))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
