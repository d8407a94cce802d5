"""`hf-mel space`: runs the demo Space on this machine."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def space(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A run folder, or a model on the Hub. Default: the first in runs/ that has a knowledge base."
        ),
    ] = None,
    kb: Annotated[
        str | None, typer.Argument(help="A knowledge base that this model built. Default: the first in kb/.")
    ] = None,
    also_model: Annotated[list[str] | None, typer.Option(help="Another model to choose from. Repeatable.")] = None,
    also_kb: Annotated[
        list[str] | None, typer.Option(help="Another knowledge base to choose from. Repeatable.")
    ] = None,
    reranker: Annotated[
        str | None, typer.Option(help="A reranker (a run folder, or a model on the Hub) for the candidates of MODEL.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine. Other machines have no access.")] = 7860,
) -> None:
    """Start the demo, a web page that links the mentions of a caption with a photo and shows the evidence.

    Without arguments it uses the model and the knowledge base of [b]hf-mel demo[/b].

    Examples:

      hf-mel space

      hf-mel space runs/mimic_flags kb/flags_mel --also-model runs/mimic_flags-text --also-kb kb/flags_mel-text
    """
    from hf_mel.errors import MissingExtraError

    if find_spec("gradio") is None:
        raise MissingExtraError(
            "The Space needs Gradio, which is not installed.", remedy='Run pip install "hf_mel[space]".'
        )
    if model is None or kb is None:
        model, kb = _matching_pair(model, kb)
    models: dict[str, str | dict[str, str]] = {
        _display_name(source): source for source in [model, *(also_model or [])]
    }
    if reranker is not None:
        both = f"{_display_name(model)} + {_display_name(reranker)}"
        models = {both: {"model": model, "reranker": reranker}, **models}
    os.environ["MEL_MODELS"] = json.dumps(models)
    os.environ["MEL_KBS"] = json.dumps({_display_name(source): source for source in [kb, *(also_kb or [])]})
    os.environ["GRADIO_SERVER_PORT"] = str(port)
    import hf_mel.spaces.entity_linking

    folder = Path(hf_mel.spaces.entity_linking.__path__[0])
    sys.path.insert(0, str(folder))  # the Hub runs app.py like this, too
    runpy.run_path(str(folder / "app.py"), run_name="__main__")


def _matching_pair(model: str | None, kb: str | None) -> tuple[str, str]:
    """Returns the first model of runs/ and the first knowledge base of kb/ that it built; either may be given."""
    from hf_mel.errors import KnowledgeBaseError, MelError
    from hf_mel.linking.linker import EntityLinker

    models = [model] if model else [str(path.parent) for path in sorted(Path("runs").glob("*/config.json"))]
    kbs = [kb] if kb else [str(path.parent) for path in sorted(Path("kb").glob("*/kb.json"))]
    for model, kb in itertools.product(models, kbs):
        try:
            EntityLinker.from_pretrained(model, kb=kb)
        except MelError:
            continue
        return model, kb
    raise KnowledgeBaseError(
        "No model in runs/ has a knowledge base in kb/.",
        remedy="Create both with hf-mel demo, or name them: hf-mel space MODEL KB",
    )


def _display_name(source: str) -> str:
    """Returns the last part of a folder or Hub id."""
    return source.rstrip("/").rsplit("/", 1)[-1]
