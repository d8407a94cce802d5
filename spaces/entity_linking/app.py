"""Demo Space for entity linking: links the mentions of a caption with a photo and shows the evidence.

Run it with `hf-mel space MODEL KB`, or as a Space with `MEL_MODELS` and `MEL_KBS` set (see README.md).
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from handlers import Handlers, load_examples
from service import MAX_ARCHIVE_BYTES, Refused, Service, Session, read_image
from tabs import WORKERS, link_tab, many_mentions_tab, own_entities_tab, whole_text_tab

HERE = Path(__file__).parent
DEFAULT_MODELS = {"MIMIC on flags": "hf-mel/mimic-flags"}
DEFAULT_KBS = {"Flags of 129 states": "hf-mel/flags-mel-kb"}
SCRIPTS = ("selection.js", "mentions.js")
#: Requests that may wait in the queue. Further ones are refused.
WAITING = 64
#: Lifetime of a visitor's files and knowledge bases, and the number of visitors they are kept for.
SESSION_SECONDS, SESSIONS = 3600, 500
#: Seconds after which freed memory is given back to the system.
RELEASE_SECONDS = 60

INTRO = """# Who is meant?
A name in a caption can refer to many things: are *the Koreans* from the North or from the South? This model reads the
caption **and looks at the photo**, compares both with every entry of a knowledge base, and ranks the entries. The first
one is its answer. This task is called *entity linking*. Try an example, or enter a caption of your own, select the
ambiguous words, and press **Link**."""


def build(service: Service) -> gr.Blocks:
    """Returns the app for the models and knowledge bases of a [`Service`]."""
    model, kb = next(iter(service.models)), next(iter(service.kbs))
    handlers = Handlers(service, load_examples(service.linker(model, kb)))
    with gr.Blocks(title="Who is meant?", analytics_enabled=False, delete_cache=(600, SESSION_SECONDS)) as demo:
        session = gr.State(Session(), time_to_live=SESSION_SECONDS, delete_callback=lambda state: state.close())
        gr.Markdown(INTRO)
        model_menu, kb_menu = link_tab(handlers, session)
        whole_text_tab(handlers, model_menu, kb_menu, session)
        own_entities_tab(handlers, model_menu, kb_menu, session)
        many_mentions_tab(handlers, model_menu, kb_menu, session)
        add_api(service)
    demo.queue(max_size=WAITING, default_concurrency_limit=WORKERS)
    return demo


def add_api(service: Service) -> None:
    """Adds the endpoints for programs, `/link`, `/annotate` and `/batch`. They know the Space's own knowledge bases only."""
    default_model, default_kb = next(iter(service.models)), next(iter(service.kbs))

    def link(
        text: str,
        mention: str,
        image: FileData | None = None,
        model: str = default_model,
        kb: str = default_kb,
        top_k: int = 5,
        nil_threshold: float | None = None,
        start: int | None = None,
        where: str | None = None,
    ) -> dict:
        """Links one mention of a text, with or without an image, and returns its candidates with their scores."""
        try:
            picture = read_image(uploaded_path(image))
            place: Any = mention
            if type(start) is int and isinstance(mention, str):
                if text[start : start + len(mention)] != mention:
                    raise Refused(f"“{mention[:80]}” does not start at character {start} of the text.")
                place = (start, start + len(mention))
            results, seconds = service.link(
                text, [place], picture, model=model, kb=kb, top_k=top_k, nil_threshold=nil_threshold, where=where
            )
        except Refused as refused:
            raise gr.Error(str(refused), print_exception=False) from refused
        return {**results[0].to_dict(), "seconds": seconds}

    def annotate(
        text: str,
        image: FileData | None = None,
        model: str = default_model,
        kb: str = default_kb,
        top_k: int = 5,
        where: str | None = None,
    ) -> dict:
        """Finds the names of the knowledge base in a text, and links them: spans, entities and scores."""
        try:
            picture = read_image(uploaded_path(image))
            annotated, seconds = service.annotate(text, picture, model=model, kb=kb, top_k=top_k, where=where)
        except Refused as refused:
            raise gr.Error(str(refused), print_exception=False) from refused
        return {**annotated.to_dict(), "seconds": seconds}

    def batch(file: FileData, model: str = default_model, kb: str = default_kb, top_k: int = 3) -> list[dict]:
        """Links every mention of a .csv, .tsv, .json or .jsonl file with the columns text and mention."""
        try:
            return service.link_batch(uploaded_path(file), model=model, kb=kb, top_k=top_k)
        except Refused as refused:
            raise gr.Error(str(refused), print_exception=False) from refused

    gr.api(link, api_name="link", concurrency_id="model", concurrency_limit=WORKERS)
    gr.api(annotate, api_name="annotate", concurrency_id="model", concurrency_limit=WORKERS)
    gr.api(batch, api_name="batch", concurrency_id="model", concurrency_limit=WORKERS)


def uploaded_path(file: Any) -> str | None:
    """Returns the path of an uploaded file; `None` stays `None`.

    Raises:
        Refused: The path was named by the client instead of uploaded.
    """
    if file is None:
        return None
    path = Path(str(file["path"] if isinstance(file, dict) else file.path)).resolve()
    uploads = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()
    if not path.is_relative_to(uploads) or not path.is_file():
        raise Refused("Upload the file; a path alone is not read.")
    return str(path)


def release_freed_memory() -> None:
    """Gives freed memory back to the system.

    The C library keeps what the threads of requests have freed, in pieces between others that are in use, and later requests
    do not fit into all of them. Without this, the process grows for hours. Other C libraries than glibc have no such function.
    """
    with suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _release_from_time_to_time() -> None:
    while True:
        time.sleep(RELEASE_SECONDS)
        release_freed_memory()


def launch(demo: gr.Blocks, **options: Any) -> Any:
    """Starts the app with its theme, scripts and limits."""
    threading.Thread(target=_release_from_time_to_time, daemon=True).start()
    return demo.launch(
        theme=gr.themes.Default(),
        css_paths=HERE / "style.css",
        head="".join(f"<script>{(HERE / name).read_text(encoding='utf-8')}</script>" for name in SCRIPTS),
        max_file_size=MAX_ARCHIVE_BYTES,
        state_session_capacity=SESSIONS,
        footer_links=["api"],
        **options,
    )


def main() -> None:
    """Starts the app with the models and knowledge bases of the environment."""
    models = json.loads(os.environ.get("MEL_MODELS", "null")) or DEFAULT_MODELS
    kbs = json.loads(os.environ.get("MEL_KBS", "null")) or DEFAULT_KBS
    launch(build(Service(models, kbs)))


if __name__ == "__main__":
    main()
