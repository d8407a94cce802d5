"""`hf-mel relink`: links again those stored mentions that a change of the knowledge base can change."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_mel.cli.options import AsJson, Device, KbRevision, MentionsPerPass, TrustRemoteCode

if TYPE_CHECKING:
    from hf_mel.linking.relinking import Relinking

logger = logging.getLogger(__name__)

#: Options of a linker that results record, which a linker is opened with again.
_OPTIONS = ("precision", "rerank_k", "name_weight", "where", "soft", "soft_bonus")


def relink(
    results: Annotated[
        Path,
        typer.Argument(
            help="Results of [b]hf-mel link --input … --relinkable[/b], with their .relink file beside them."
        ),
    ],
    kb: Annotated[
        str,
        typer.Option(
            help="The knowledge base of the results, after [b]hf-mel kb add[/b], [b]remove[/b] or [b]update[/b]."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The .jsonl file of the new results, which can be relinked in turn; it may be that of the old ones. "
            "Without it, the difference is shown, and nothing is written.",
            dir_okay=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that linked them, if it has moved: a folder, or a model on the Hub.")
    ] = None,
    reranker: Annotated[str | None, typer.Option(help="The reranker that ordered them, if it has moved.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Number of changes to show. --json has all.")] = 20,
    as_json: AsJson = False,
    batch_size: MentionsPerPass = 32,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    kb_revision: KbRevision = None,
) -> None:
    """Link again only the mentions whose result a change of the knowledge base can change, and show the difference.

    A result can change if one of its candidates was removed or edited, or if a new or edited entity reaches the score of its
    last candidate. Bounds prove for most mentions that none does, without encoding them. The new results are those of linking
    all mentions anew. The model and the settings are those that the results were linked with, the NIL threshold too: a warning
    says so if the model has another one now.

    Examples:

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.csv --output linked.jsonl --relinkable

      hf-mel kb update kb/flags --model runs/mimic_flags --entities flags.csv

      hf-mel relink linked.jsonl --kb kb/flags

      hf-mel relink linked.jsonl --kb kb/flags --output linked.jsonl --json > changes.json
    """
    from hf_mel.cli.printing import print_json, show_logs
    from hf_mel.linking.link_file import check_output
    from hf_mel.linking.linker import EntityLinker
    from hf_mel.linking.relinking import relink_file
    from hf_mel.linking.traces import Traces

    if output is not None:
        check_output(output)
    traces = Traces.read(results)
    options: dict[str, Any] = {name: traces.settings.get(name) for name in _OPTIONS}
    with show_logs():
        linker = EntityLinker.from_pretrained(
            model or traces.origin.model,
            kb,
            reranker=reranker or traces.origin.reranker,
            device=device,
            trust_remote_code=trust_remote_code,
            revision=None if model else traces.origin.revision,
            kb_revision=kb_revision,
            **options,
        )
        linker.nil_threshold, of_model = traces.settings["nil_threshold"], linker.nil_threshold
        if linker.nil_threshold != of_model:
            logger.warning(
                "The results keep the NIL threshold that they were linked with (%s), and that of the model is %s. To use "
                "that of the model, link the mentions anew: hf-mel link --relinkable.",
                *("none" if value is None else f"{value:g}" for value in (linker.nil_threshold, of_model)),
            )
        done = relink_file(linker, results, output, batch_size=batch_size, progress=True)
    if as_json:
        print_json(done.to_dict())
        return
    _print_relinking(done, output, limit)


def _print_relinking(done: Relinking, output: Path | None, limit: int) -> None:
    """Prints the changes as a table, and what was compared."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hf_mel.cli.printing import print_plain, shorten

    shown = done.changes[:limit]
    if shown:
        table = Table()
        for column in ("line", "mention", "before", "after", "change"):
            table.add_column(column, justify="right" if column == "line" else "left", overflow="ellipsis")
        for change in shown:
            sides = []
            for side in (change.before, change.after):
                name = "review" if side["entity_id"] is None else side["name"]
                linked = "NIL" if side["entity_id"] == "NIL" else f"{shorten(name, 32)} ({side['entity_id'] or '–'})"
                sides.append(Text(shorten(f"{linked} {side['score']:.3f}", 48)))
            table.add_row(str(change.line), Text(shorten(change.mention, 32)), *sides, change.change)
        Console().print(table)
    if len(done.changes) > len(shown):
        print_plain(f"… and {len(done.changes) - len(shown):,} more changes (--limit, --json)")
    links = sum(change.change == "link" for change in done.changes)
    print_plain(
        f"{len(done.changes):,} of {done.num_mentions:,} results changed, {links:,} of them the link. New or edited entities: "
        f"{done.num_new_entities:,}; removed or edited ones: {done.num_gone_entities:,}.\n"
        f"{done.num_encoded:,} mentions were encoded and scored with the new entities, {done.num_ranked:,} of them with all; "
        f"the others cannot have changed."
    )
    print_plain(
        f"Written to {output}." if output else "Nothing was written: give --output FILE to keep the new results."
    )
