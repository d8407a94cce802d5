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
    read_image,
    write_results,
)

HERE = Path(__file__).parent
DEFAULT_MODELS = {"MIMIC on flags": "hf-mel/mimic-flags"}
DEFAULT_KBS = {"Flags of 129 states": "hf-mel/flags-mel-kb"}
#: Requests working and waiting at a time; more are told to come back.
WORKERS, WAITING = 2, 64
SESSION_SECONDS = 3600
#: Shown when the page opens: one that the photo decides.
_FIRST_EXAMPLE = 2
_EMPTY = render.message("The answer appears here: candidates, best first, and why.", "info")

INTRO = """# Who is meant?
A name in a caption can mean many things: *Georgia* may be a country, a state or a rugby team. **Entity linking** picks the
entry of a knowledge base that is meant; this model reads the sentence **and looks at the photo**. Try an example, or your
own caption: select the ambiguous words with the mouse, and press **Link**."""


def build(service: Service) -> gr.Blocks:
    """The app around a [`Service`]."""
    models, kbs = list(service.models), list(service.kbs)

    def places(text: str, mentions: str, selected: list[list[Any]]) -> list[Any]:
        """The mentions asked for: a selected one by its place in the text, a typed one by its words."""
        spans = {text[start:end]: (start, end) for start, end in selected if 0 <= start < end <= len(text)}
        lines = [line.strip() for line in (mentions or "").split("\n") if line.strip()]
        return [spans.get(line, line) for line in lines]

    def answer_of(text, mentions, selected, image, model, kb, top_k, threshold, session):
        try:
            picture = read_image(image)
            results, seconds = service.link(
                text or "",
                places(text or "", mentions, selected),
                picture,
                model=model,
                kb=kb,
                session=session,
                top_k=int(top_k),
                nil_threshold=threshold,
            )
            linker = service.linker(model, kb, session)
            answers = [_answer(linker, text, picture, result) for result in results]
            return render.results(answers, seconds)
        except Refused as refused:
            return render.message(str(refused))

    def compare_evidence(text, mentions, selected, image, model, kb, session):
        try:
            picture, wanted = read_image(image), places(text or "", mentions, selected)[:1]
            whole, _ = service.link(text or "", wanted, picture, model=model, kb=kb, session=session, top_k=3)
            linker = service.linker(model, kb, session)
            columns = [("All evidence together", whole[0], _images(linker, whole[0]))]
            units = whole[0].best.unit_scores
            if len(units) < 2:
                return render.message("This model has one kind of evidence only: there is nothing to compare.", "info")
            for unit in units:
                alone, _ = service.link(
                    text, wanted, picture, model=model, kb=kb, session=session, top_k=3, units=[unit]
                )
                columns.append((f"{render.unit_name(unit)} alone", alone[0], _images(linker, alone[0])))
            return render.comparison(columns)
        except Refused as refused:
            return render.message(str(refused))

    def compare_models(text, mentions, selected, image, model, other, kb, other_kb, session):
        try:
            picture, wanted = read_image(image), places(text or "", mentions, selected)[:1]
            columns = []
            for name, base in ((model, kb), (other, other_kb)):
                result, _ = service.link(text or "", wanted, picture, model=name, kb=base, session=session, top_k=5)
                columns.append(
                    (f"{name} · {base}", result[0], _images(service.linker(name, base, session), result[0]))
                )
            return render.comparison(columns)
        except Refused as refused:
            return render.message(str(refused))

    def select(event: gr.SelectData, text: str, mentions: str, selected: list, several: bool):
        words, start = event.value or "", event.index[0]
        start += len(words) - len(words.lstrip())
        words = words.strip()
        if not words or words == (text or "").strip():  # nothing, or all of it to write another caption
            return gr.skip(), gr.skip()
        lines = [line for line in (mentions or "").split("\n") if line.strip() and line != words] if several else []
        return "\n".join([*lines, words]), [*(selected if several else []), [start, start + len(words)]]

    def own_kb(name, table, archive, model, session, progress=gr.Progress()):
        try:
            if table is None:
                raise Refused("Choose the table of your entities first.")
            progress(0.1, "Checking the rows, encoding the entities")
            label, count = service.build_kb(name, table, archive, model=model, session=session)
            words = f"“{label}” is ready: {count:,} entities. It is chosen on the first page; it is deleted an hour after you leave."
            choices = [*kbs, *session.kbs]
            file = gr.update(value=service.download_kb(label, session), visible=True)
            return (
                render.message(words, "info"),
                gr.update(choices=choices, value=label),
                gr.update(choices=choices),
                session,
                file,
            )
        except Refused as refused:
            return (
                render.message(str(refused)),
                gr.update(),
                gr.update(),
                session,
                gr.update(value=None, visible=False),
            )

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
            words = f"{len(rows):,} mentions linked" + (
                f", {failed:,} could not be: see the last column." if failed else "."
            )
            files = list(write_results(rows, folder))
            shown = {"visible": True}
            return (
                render.message(words, "info"),
                gr.update(value=table[:100], **shown),
                gr.update(value=files, **shown),
            )
        except Refused as refused:
            return render.message(str(refused)), gr.update(visible=False), gr.update(visible=False)

    def api_link(
        text: str,
        mention: str,
        image: FileData | None = None,
        model: str = models[0],
        kb: str = kbs[0],
        top_k: int = 5,
        nil_threshold: float | None = None,
    ) -> dict:
        """Links one mention of a text, with or without an image, and returns its candidates with their scores."""
        try:
            picture = read_image(_uploaded(image))
            results, seconds = service.link(
                text, [mention], picture, model=model, kb=kb, top_k=top_k, nil_threshold=nil_threshold
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

    def show_example(k: int):
        """Form values of one example, and its answer with the first model and knowledge base."""
        example = examples[k]
        photo = str(HERE / "examples" / example["image"])
        form = [example["text"], "\n".join(example["mentions"]), example["spans"], photo]
        return [*form, answer_of(*form, models[0], kbs[0], 5, None, None)]

    examples = _examples(service.linker(models[0], kbs[0]))
    first = show_example(_FIRST_EXAMPLE) if examples else ["", "", [], None, _EMPTY]

    with gr.Blocks(title="Who is meant?", analytics_enabled=False, delete_cache=(600, SESSION_SECONDS)) as demo:
        session = gr.State(Session(), time_to_live=SESSION_SECONDS, delete_callback=lambda state: state.close())
        selected = gr.State(first[2])
        gr.Markdown(INTRO)
        with gr.Tab("Link a mention"):
            buttons = []
            if examples:
                gr.Markdown("**Examples**: the same words, decided by the sentence, by the photo, or by both.")
                with gr.Row(elem_id="examples"):
                    for example in examples:
                        icon = str(HERE / "examples" / example["image"])
                        buttons.append(gr.Button(example["label"], icon=icon, size="sm", min_width=150))
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=300):
                    text = gr.Textbox(
                        first[0],
                        label="Caption",
                        lines=3,
                        max_length=MAX_TEXT,
                        elem_id="caption",
                        placeholder="Georgia won again.",
                        info="Select the words to link with mouse or keyboard.",
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
                    several = gr.Checkbox(False, label="Selecting adds a mention instead of replacing it")
                    image = gr.Image(
                        first[3],
                        label="Photo beside the caption (optional)",
                        type="filepath",
                        sources=["upload", "clipboard"],
                        height=220,
                        elem_id="photo",
                    )
                    go = gr.Button("Link", variant="primary", elem_id="go")
                    with gr.Accordion("Model, knowledge base, options", open=False):
                        model = gr.Dropdown(models, value=models[0], label="Model")
                        kb = gr.Dropdown(kbs, value=kbs[0], label="Knowledge base", elem_id="kb")
                        top_k = gr.Slider(1, MAX_TOP_K, value=5, step=1, label="Candidates to show")
                        threshold = gr.Number(
                            value=None,
                            label="NIL threshold",
                            info="Below this score, a mention is said to be in no entry. Empty: the model's own.",
                        )
                with gr.Column(scale=3, min_width=300):
                    with gr.Tab("Answer"):
                        answer = gr.HTML(first[4], elem_id="answer")
                    with gr.Tab("Text, image, both"):
                        gr.Markdown("The first mention, decided by one kind of evidence at a time.")
                        by_unit = gr.Button("Compare the kinds of evidence")
                        units_answer = gr.HTML(elem_id="units")
                    with gr.Tab("Two models"):
                        with gr.Row():
                            other = gr.Dropdown(models, value=models[-1], label="Other model")
                            other_kb = gr.Dropdown(kbs, value=kbs[-1], label="Its knowledge base")
                        by_model = gr.Button("Compare the models")
                        models_answer = gr.HTML(elem_id="models")
        with gr.Tab("Your own entities"):
            gr.Markdown(
                "Link against a knowledge base of your own: a **.csv** or **.jsonl** with the columns `id`, `name` and, if "
                "you have them, `description`, `attributes`, `aliases`, `image` (a file name in the zip). At most "
                f"{MAX_KB_ROWS:,} entities. Nobody else sees it, and it is deleted when you leave."
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
        asked, form = [text, mentions, selected, image], [model, kb, session]
        text.select(
            select,
            [text, mentions, selected, several],
            [mentions, selected],
            trigger_mode="always_last",
            api_visibility="private",
            show_progress="hidden",
        )
        for event in (go.click, mentions.submit):
            event(answer_of, [*asked, model, kb, top_k, threshold, session], answer, **private)
        for k, button in enumerate(buttons):
            button.click(partial(show_example, k), None, [*asked, answer], **private)
        by_unit.click(compare_evidence, [*asked, *form], units_answer, **private)
        by_model.click(compare_models, [*asked, model, other, kb, other_kb, session], models_answer, **private)
        kb_go.click(
            own_kb, [kb_name, kb_table, kb_zip, model, session], [kb_answer, kb, other_kb, session, kb_file], **private
        )
        batch_go.click(link_file, [batch_file, *form], [batch_answer, batch_table, batch_out], **private)
        gr.api(api_link, api_name="link", concurrency_id="model", concurrency_limit=WORKERS)
        gr.api(api_batch, api_name="batch", concurrency_id="model", concurrency_limit=WORKERS)
    demo.queue(max_size=WAITING, default_concurrency_limit=WORKERS)
    return demo


def _examples(linker: Any) -> list[dict[str, Any]]:
    """The gallery, if the first knowledge base holds the entities it is about."""
    examples = json.loads((HERE / "examples" / "examples.json").read_text(encoding="utf-8"))
    known = all(gold in linker.kb for example in examples for gold in example["gold"] if gold != "NIL")
    return examples if known else []


def _answer(linker: Any, text: str, picture: Any, result: Any) -> dict[str, Any]:
    images = _images(linker, result)
    mention = {"text": text, "mention": result.mention, "start": result.start, "end": result.end, "image": picture}
    explanation = linker.explain(mention, result.best.entity_id)
    evidence = render.evidence(text, explanation, picture, images[0], result.best.name)
    return {"result": result, "images": images, "evidence": evidence}


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
        max_file_size=MAX_ARCHIVE_BYTES,
        footer_links=["api"],
        show_error=True,
        **options,
    )


def main() -> None:
    """Starts the app with the models and knowledge bases of the environment."""
    models = json.loads(os.environ.get("MEL_MODELS", "null")) or DEFAULT_MODELS
    kbs = json.loads(os.environ.get("MEL_KBS", "null")) or DEFAULT_KBS
    launch(build(Service(models, kbs)))


if __name__ == "__main__":
    main()
