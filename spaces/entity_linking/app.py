"""The demo Space: a caption, a photo and a mention → who is meant, and why the model thinks so.

Run it with `hf-mel space MODEL KB`, or as a Space with `MEL_MODELS` and `MEL_KBS` set (see README.md).
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import render
from gradio.data_classes import FileData
from service import (
    MAX_ARCHIVE_BYTES,
    MAX_BATCH_ROWS,
    MAX_KB_ROWS,
    MAX_TEXT,
    MAX_TOP_K,
    Refused,
    Service,
    Session,
    mentions_of,
    read_image,
    write_results,
)

HERE = Path(__file__).parent
DEFAULT_MODELS = {"MIMIC on flags": "hf-mel/mimic-flags"}
DEFAULT_KBS = {"Flags of 129 states": "hf-mel/flags-mel-kb"}
#: Requests working and waiting at a time; more are told to come back.
WORKERS, WAITING = 2, 64
#: A visitor's files and knowledge bases are kept for so long, and for so many visitors.
SESSION_SECONDS, SESSIONS = 3600, 500
_EMPTY = render.message("The answer appears here: candidates, best first, and why.", "info")

INTRO = """# Who is meant?
A name in a caption can mean many things: are *the Koreans* of the North or of the South? This model reads the caption
**and looks at the photo**, compares both with every entry of a knowledge base, and ranks the entries: the first is who is
meant. That is *entity linking*. Try an example, or your own caption: select the words you wonder about, and press **Link**."""


def build(service: Service) -> gr.Blocks:
    """The app around a [`Service`]."""
    models, kbs = list(service.models), list(service.kbs)

    def answer_of(text, mentions, spans, image, model, kb, top_k, threshold, session, note=""):
        try:
            picture = read_image(image)
            results, seconds = service.link(
                text or "",
                mentions_of(text or "", mentions, spans),
                picture,
                model=model,
                kb=kb,
                session=session,
                top_k=top_k or 5,
                nil_threshold=threshold,
            )
            linker = service.linker(model, kb, session)
            answers = []
            for result in results:
                images = _images(linker, result)
                explanation = service.explain(text, picture, result, linker)
                evidence = render.evidence(text, explanation, picture, images[0], result.best.name)
                answers.append({"result": result, "images": images, "evidence": evidence})
            return render.results(answers, seconds, note)
        except Refused as refused:
            return render.message(str(refused))

    def compare_evidence(text, mentions, spans, image, model, kb, session):
        try:
            picture, wanted = read_image(image), mentions_of(text or "", mentions, spans)[:1]
            asked = {"model": model, "kb": kb, "session": session, "top_k": 3}
            whole, _ = service.link(text or "", wanted, picture, **asked)
            linker = service.linker(model, kb, session)
            columns = [("All together", whole[0], _images(linker, whole[0]))]
            units = whole[0].best.unit_scores
            if len(units) < 2:
                return render.message("This model has one kind of evidence only: there is nothing to compare.", "info")
            for unit in units:
                alone, _ = service.link(text, wanted, picture, units=[unit], **asked)
                columns.append((f"{render.unit_name(unit)} alone", alone[0], _images(linker, alone[0])))
            words = "" if picture else "No photo was given: an image alone cannot tell, and its column means nothing."
            return render.comparison(columns, words)
        except Refused as refused:
            return render.message(str(refused))

    def compare_models(text, mentions, spans, image, model, other, kb, other_kb, session):
        try:
            picture, wanted = read_image(image), mentions_of(text or "", mentions, spans)[:1]
            columns = []
            for name, base in ((model, kb), (other, other_kb)):
                result, _ = service.link(text or "", wanted, picture, model=name, kb=base, session=session, top_k=5)
                columns.append(
                    (f"{name} · {base}", result[0], _images(service.linker(name, base, session), result[0]))
                )
            return render.comparison(columns)
        except Refused as refused:
            return render.message(str(refused))

    def fitting(model: str, kb: str, session: Session):
        """The knowledge bases to choose from once a model is chosen: those it built."""
        choices = service.fitting_kbs(model, session)
        return gr.update(choices=choices, value=kb if kb in choices else next(iter(choices), None))

    def own_kb(name, table, archive, model, session, progress=gr.Progress()):
        try:
            if table is None:
                raise Refused("Choose the table of your entities first.")
            progress(0.1, "Checking the rows, encoding the entities")
            label, count = service.build_kb(name, table, archive, model=model, session=session)
            words = (
                f"Every row could be used: “{label}” is ready, with {count:,} entities. It is now chosen on the first "
                "page, and will be deleted in an hour."
            )
            choices = gr.update(choices=service.fitting_kbs(model, session), value=label)
            file = gr.update(value=service.download_kb(label, session), visible=True)
            return render.message(words, "info"), choices, session, file
        except Refused as refused:
            return render.message(str(refused)), gr.update(), session, gr.update(value=None, visible=False)

    def link_file(path, model, kb, session, progress=gr.Progress()):
        try:
            if path is None:
                raise Refused("Choose a file of mentions first.")
            rows = service.link_batch(path, model=model, kb=kb, session=session, progress=progress)
            folder = Path(tempfile.mkdtemp(dir=session.folder))
            table = [
                [r["text"], r["mention"], r.get("entity_id", ""), r.get("name", r.get("error", ""))] for r in rows
            ]
            failed = sum("error" in row for row in rows)
            words = f"{len(rows) - failed:,} of {len(rows):,} mentions linked" + (
                "; why the others could not be stands in the last column." if failed else "."
            )
            files = list(write_results(rows, folder))
            shown = {"visible": True}
            return (
                render.message(words, "info"),
                gr.update(value=table[:100], **shown),
                gr.update(value=files, **shown),
                session,
            )
        except Refused as refused:
            return render.message(str(refused)), gr.update(visible=False), gr.update(visible=False), session

    def api_link(
        text: str,
        mention: str,
        image: FileData | None = None,
        model: str = models[0],
        kb: str = kbs[0],
        top_k: int = 5,
        nil_threshold: float | None = None,
        start: int | None = None,
    ) -> dict:
        """Links one mention of a text, with or without an image, and returns its candidates with their scores."""
        try:
            picture = read_image(_uploaded(image))
            if start is not None and (type(start), type(mention)) == (int, str):
                if text[start : start + len(mention)] != mention:
                    raise Refused(f"“{mention[:80]}” does not start at character {start} of the text.")
                place: Any = (start, start + len(mention))
            else:
                place = mention
            results, seconds = service.link(
                text, [place], picture, model=model, kb=kb, top_k=top_k, nil_threshold=nil_threshold
            )
        except Refused as refused:
            raise gr.Error(str(refused), print_exception=False) from refused
        return {**results[0].to_dict(), "seconds": seconds}

    def api_batch(file: FileData, model: str = models[0], kb: str = kbs[0], top_k: int = 3) -> list[dict]:
        """Links every mention of a .csv or .jsonl file with the columns text and mention."""
        try:
            return service.link_batch(_uploaded(file), model=model, kb=kb, top_k=top_k)
        except Refused as refused:
            raise gr.Error(str(refused), print_exception=False) from refused

    def fill(k: int):
        """Form values of one example."""
        example = examples[k]
        photo = str(HERE / "examples" / example["image"])
        return [example["text"], "\n".join(example["mentions"]), json.dumps(example["spans"]), photo]

    def answer_example(k: int, model, kb, top_k, threshold, session):
        text, mentions, spans, photo = fill(k)
        return answer_of(text, mentions, spans, photo, model, kb, top_k, threshold, session, examples[k]["note"])

    examples = _examples(service.linker(models[0], kbs[0]))
    others = service.fitting_kbs(models[-1])
    first = ["", "", "", None, _EMPTY]
    if examples:
        first = [*fill(0), answer_example(0, models[0], kbs[0], 5, None, None)]

    with gr.Blocks(title="Who is meant?", analytics_enabled=False, delete_cache=(600, SESSION_SECONDS)) as demo:
        session = gr.State(Session(), time_to_live=SESSION_SECONDS, delete_callback=lambda state: state.close())
        gr.Markdown(INTRO)
        with gr.Tab("Link a mention"):
            buttons = []
            if examples:
                with gr.Row(elem_id="examples"):
                    for example in examples:
                        icon = str(HERE / "examples" / example["image"])
                        buttons.append(gr.Button(example["label"], icon=icon, size="sm", min_width=0))
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=300):
                    text = gr.Textbox(
                        first[0],
                        label="Caption",
                        lines=3,
                        max_length=MAX_TEXT,
                        elem_id="caption",
                        placeholder="Georgia won again.",
                        info="Select in it, with mouse or keyboard, the words you wonder about.",
                    )
                    mentions = gr.Textbox(
                        first[1],
                        label="Mention",
                        lines=1,
                        max_lines=8,
                        elem_id="mention",
                        placeholder="Georgia",
                        info="Filled by your selection, or typed. Several: one a line.",
                    )
                    spans = gr.Textbox(first[2], label="Places of the mentions", visible="hidden", elem_id="spans")
                    gr.Checkbox(False, label="Several: selecting adds a mention", elem_id="several")
                    image = gr.Image(
                        first[3],
                        label="Photo beside the caption (optional)",
                        type="filepath",
                        sources=["upload", "clipboard"],
                        height=200,
                        elem_id="photo",
                    )
                    # Gradio would decode it, whatever its size, and fail without a word on what is no image.
                    image.preprocess = lambda payload: payload and (payload.path or "")  # type: ignore[method-assign,assignment,return-value]
                    go = gr.Button("Link", variant="primary", elem_id="go")
                    with gr.Accordion("Model, knowledge base, options", open=False):
                        model = gr.Dropdown(models, value=models[0], label="Model")
                        kb = gr.Dropdown(
                            service.fitting_kbs(models[0]), value=kbs[0], label="Knowledge base", elem_id="kb"
                        )
                        top_k = gr.Slider(1, MAX_TOP_K, value=5, step=1, label="Candidates to show")
                        threshold = gr.Number(
                            value=None,
                            label="NIL threshold",
                            info="Below this score, a mention is said to be in no entry. Empty: the model's own.",
                        )
                with gr.Column(scale=3, min_width=300):
                    with gr.Tab("Answer"):
                        answer = gr.HTML(first[4], elem_id="answer")
                    with gr.Tab("Text alone / image alone / all"):
                        gr.Markdown("The first mention, decided by one kind of evidence at a time.")
                        by_unit = gr.Button("Compare the kinds of evidence")
                        units_answer = gr.HTML(elem_id="units")
                    with gr.Tab("Two models"):
                        with gr.Row():
                            other = gr.Dropdown(models, value=models[-1], label="Other model")
                            other_kb = gr.Dropdown(others, value=next(iter(others), None), label="Its knowledge base")
                        by_model = gr.Button("Compare the models")
                        models_answer = gr.HTML(elem_id="models")
        with gr.Tab("Your own entities"):
            gr.Markdown(
                "Link against a knowledge base of your own: a **.csv** or **.jsonl** with the columns `id`, `name` and, if "
                "you have them, `description`, `attributes`, `aliases`, `image` (a file name in the zip). At most "
                f"{MAX_KB_ROWS:,} entities. Nobody else sees it, and it is deleted after an hour."
            )
            with gr.Row():
                kb_table = gr.File(
                    label="Entities (.csv, .jsonl)", file_types=[".csv", ".jsonl"], elem_id="kb-table", height=140
                )
                kb_zip = gr.File(label="Images (.zip, optional)", file_types=[".zip"], elem_id="kb-zip", height=140)
            kb_name = gr.Textbox(label="Name", value="My knowledge base", max_length=60)
            kb_go = gr.Button("Check and build", variant="primary")
            kb_answer = gr.HTML(elem_id="kb-answer")
            kb_file = gr.File(label="The built knowledge base, for hf_mel", interactive=False, visible=False)
        with gr.Tab("Many mentions"):
            gr.Markdown(
                f"A **.csv** or **.jsonl** with the columns `text` and `mention`, at most {MAX_BATCH_ROWS:,} rows, linked with "
                "the model and the knowledge base chosen on the first page."
            )
            batch_file = gr.File(
                label="Mentions (.csv, .jsonl)", file_types=[".csv", ".jsonl"], elem_id="batch-file", height=140
            )
            batch_go = gr.Button("Link all", variant="primary")
            batch_answer = gr.HTML(elem_id="batch-answer")
            batch_table = gr.Dataframe(
                headers=["text", "mention", "entity", "name"],
                interactive=False,
                wrap=True,
                label="First 100 rows",
                visible=False,
                elem_id="batch-table",
            )
            batch_out = gr.File(label="Results (CSV, JSON)", file_count="multiple", interactive=False, visible=False)

        private: dict[str, Any] = {
            "api_visibility": "private",
            "concurrency_id": "model",
            "concurrency_limit": WORKERS,
        }
        asked, form = [text, mentions, spans, image], [model, kb, session]
        options = [model, kb, top_k, threshold, session]
        for event in (go.click, mentions.submit):
            event(answer_of, [*asked, *options], answer, **private)
        for k, button in enumerate(buttons):
            # The form at once and by itself: what a visitor types while the answer is made stays.
            button.click(partial(fill, k), None, asked, queue=False, api_visibility="private")
            button.click(partial(answer_example, k), options, answer, **private)
        for chosen, base in ((model, kb), (other, other_kb)):
            chosen.change(fitting, [chosen, base, session], base, **private)
        by_unit.click(compare_evidence, [*asked, *form], units_answer, **private)
        by_model.click(compare_models, [*asked, model, other, kb, other_kb, session], models_answer, **private)
        kb_go.click(own_kb, [kb_name, kb_table, kb_zip, model, session], [kb_answer, kb, session, kb_file], **private)
        batch_go.click(link_file, [batch_file, *form], [batch_answer, batch_table, batch_out, session], **private)
        gr.api(api_link, api_name="link", concurrency_id="model", concurrency_limit=WORKERS)
        gr.api(api_batch, api_name="batch", concurrency_id="model", concurrency_limit=WORKERS)
    demo.queue(max_size=WAITING, default_concurrency_limit=WORKERS)
    return demo


def _examples(linker: Any) -> list[dict[str, Any]]:
    """The gallery, if the first knowledge base holds the entities it is about."""
    examples = json.loads((HERE / "examples" / "examples.json").read_text(encoding="utf-8"))
    known = all(gold in linker.kb for example in examples for gold in example["gold"] if gold != "NIL")
    return examples if known else []


def _images(linker: Any, result: Any) -> list[Any]:
    return [linker.kb.image(linker.kb.row_of(c.entity_id)) for c in result.candidates]


def _uploaded(file: Any) -> str | None:
    """The path of a file that came through an upload; a path that a client merely names is not opened."""
    if file is None:
        return None
    path = Path(str(file["path"] if isinstance(file, dict) else file.path)).resolve()
    uploads = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()
    if not path.is_relative_to(uploads) or not path.is_file():
        raise Refused("Upload the file; a path alone is not read.")
    return str(path)


def launch(demo: gr.Blocks, **options: Any) -> Any:
    """Starts the app with its looks and limits."""
    return demo.launch(
        theme=gr.themes.Default(),
        css_paths=HERE / "style.css",
        head=f"<script>{(HERE / 'selection.js').read_text(encoding='utf-8')}</script>",
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
