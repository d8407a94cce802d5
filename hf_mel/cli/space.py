"""`hf-mel space`: the demo Space on this machine."""

from __future__ import annotations

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
        str | None, typer.Argument(help="A run folder, or a model on the Hub. Default: what lies in runs/.")
    ] = None,
    kb: Annotated[
        str | None, typer.Argument(help="The knowledge base this model built. Default: one in kb/ that fits.")
    ] = None,
    also_model: Annotated[
        list[str] | None, typer.Option(help="A further model to choose from. May be given several times.")
    ] = None,
    also_kb: Annotated[
        list[str] | None, typer.Option(help="A further knowledge base to choose from. May be given several times.")
    ] = None,
    reranker: Annotated[
        str | None, typer.Option(help="A reranker (a run folder or a model) that puts MODEL's best into a new order.")
    ] = None,
    port: Annotated[int, typer.Option(help="Where it listens, on this machine only.")] = 7860,
) -> None:
    """Open the demo in a browser: caption, photo, mention → who is meant, and why.

    After [b]hf-mel demo[/b], without arguments, it shows what that made.

    Examples:

      hf-mel space

      hf-mel space runs/mimic_flags kb/flags_mel --also-model runs/mimic_flags-text --also-kb kb/flags_mel-text
    """
    from hf_mel.errors import KnowledgeBaseError, MissingExtraError

    if find_spec("gradio") is None:
        raise MissingExtraError("The Space needs Gradio.", remedy="pip install 'hf_mel[space]'")
    if model is None or kb is None:
        found = _fitting(model, kb)
        if found is None:
            raise KnowledgeBaseError(
                "there is no model in runs/ with a knowledge base of its own in kb/.",
                remedy="Make them with: hf-mel demo. Or name both: hf-mel space MODEL KB",
            )
        model, kb = found
    models: dict[str, str | dict[str, str]] = {_name(place): place for place in [model, *(also_model or [])]}
    if reranker is not None:
        models = {f"{_name(model)} + {_name(reranker)}": {"model": model, "reranker": reranker}, **models}
    os.environ["MEL_MODELS"] = json.dumps(models)
    os.environ["MEL_KBS"] = json.dumps({_name(place): place for place in [kb, *(also_kb or [])]})
    os.environ["GRADIO_SERVER_PORT"] = str(port)
    import hf_mel.spaces.entity_linking

    folder = Path(hf_mel.spaces.entity_linking.__path__[0])
    sys.path.insert(0, str(folder))  # as when the Hub runs app.py
    runpy.run_path(str(folder / "app.py"), run_name="__main__")


def _fitting(model: str | None, kb: str | None) -> tuple[str, str] | None:
    """The first model of runs/ and knowledge base of kb/ that belong together; one of the two may be given."""
    from hf_mel.errors import MelError
    from hf_mel.linking.linker import EntityLinker

    models = [model] if model else [str(path.parent) for path in sorted(Path("runs").glob("*/config.json"))]
    kbs = [kb] if kb else [str(path.parent) for path in sorted(Path("kb").glob("*/kb.json"))]
    for one in models:
        for other in kbs:
            try:
                EntityLinker.from_pretrained(one, kb=other)
            except MelError:
                continue
            return one, other
    return None


def _name(place: str) -> str:
    """What a visitor reads: the last part of a folder or Hub id."""
    return place.rstrip("/").rsplit("/", 1)[-1]
