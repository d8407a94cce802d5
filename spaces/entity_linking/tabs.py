"""The layout of the app, one function per tab."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr
import render
from handlers import EXAMPLE_POST, EXAMPLES, Handlers
from service import MAX_BATCH_ROWS, MAX_FILTER, MAX_KB_ROWS, MAX_TEXT, MAX_TOP_K, TABLE_SUFFIXES

#: Requests that run at the same time.
WORKERS = 2

#: Options of events that use a model. They are no part of the public API.
_MODEL_EVENT: dict[str, Any] = {
    "api_visibility": "private",
    "concurrency_id": "model",
    "concurrency_limit": WORKERS,
}
_NO_ANSWER = render.message("The answer will appear here: the candidates, best first, and the evidence.", "info")


def link_tab(handlers: Handlers, session: gr.State) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Adds the tab that links the mentions of a caption.

    Returns:
        The menus of models and knowledge bases, which the other tabs use too.
    """
    models, kbs = list(handlers.service.models), list(handlers.service.kbs)
    form_values: list[Any] = ["", "", "", None]
    first_answer = _NO_ANSWER
    if handlers.examples:
        form_values = handlers.example_form(0)
        first_answer = handlers.answer_example(0, models[0], kbs[0], 5, None, None, None)
    with gr.Tab("Link a mention"):
        example_buttons = []
        if handlers.examples:
            with gr.Row(elem_id="examples"):
                for example in handlers.examples:
                    icon = str(EXAMPLES / example["image"])
                    example_buttons.append(gr.Button(example["label"], icon=icon, size="sm", min_width=0))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                text = gr.Textbox(
                    form_values[0],
                    label="Caption",
                    lines=3,
                    max_length=MAX_TEXT,
                    elem_id="caption",
                    placeholder="Georgia won again.",
                    info="Select the words to link, with the mouse or the keyboard.",
                )
                mentions = gr.Textbox(
                    form_values[1],
                    label="Mention",
                    lines=1,
                    max_lines=8,
                    elem_id="mention",
                    placeholder="Georgia",
                    info="Filled in by your selection, or typed. Several: one per line.",
                )
                spans = gr.Textbox(form_values[2], label="Places of the mentions", visible="hidden", elem_id="spans")
                gr.Checkbox(False, label="Several: selecting adds a mention", elem_id="several")
                image = gr.Image(
                    form_values[3],
                    label="Photo beside the caption (optional)",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=200,
                    elem_id="photo",
                )
                # Gradio's own preprocessing decodes images of any size and fails silently on other files. The path
                # goes to `service.read_image` instead.
                image.preprocess = lambda payload: payload and (payload.path or "")  # type: ignore[method-assign,assignment,return-value]
                link_button = gr.Button("Link", variant="primary", elem_id="go")
                with gr.Accordion("Model, knowledge base, options", open=False):
                    model = gr.Dropdown(models, value=models[0], label="Model")
                    kb = gr.Dropdown(
                        handlers.service.fitting_kbs(models[0]), value=kbs[0], label="Knowledge base", elem_id="kb"
                    )
                    top_k = gr.Slider(1, MAX_TOP_K, value=5, step=1, label="Candidates to show")
                    threshold = gr.Number(
                        value=None,
                        label="NIL threshold",
                        info="Below this score, a mention is not linked to any entry. Empty: the model's own threshold.",
                    )
                    where = _filter_field("where")
            with gr.Column(scale=3, min_width=300):
                with gr.Tab("Answer"):
                    answer = gr.HTML(first_answer, elem_id="answer")
                with gr.Tab("Text alone / image alone / all"):
                    gr.Markdown("The first mention, linked by one kind of evidence at a time.")
                    evidence_button = gr.Button("Compare the kinds of evidence")
                    evidence_answer = gr.HTML(elem_id="units")
                with gr.Tab("Two models"):
                    other_kbs = handlers.service.fitting_kbs(models[-1])
                    with gr.Row():
                        other_model = gr.Dropdown(models, value=models[-1], label="Other model")
                        other_kb = gr.Dropdown(
                            other_kbs, value=next(iter(other_kbs), None), label="Its knowledge base"
                        )
                    models_button = gr.Button("Compare the models")
                    models_answer = gr.HTML(elem_id="models")

    form, options = [text, mentions, spans, image], [model, kb, top_k, threshold, where, session]
    for event in (link_button.click, mentions.submit):
        event(handlers.answer, [*form, *options], answer, **_MODEL_EVENT)
    for number, button in enumerate(example_buttons):
        # Two events: the form is filled at once, and what a visitor types before the answer arrives is kept.
        button.click(partial(handlers.example_form, number), None, form, queue=False, api_visibility="private")
        button.click(partial(handlers.answer_example, number), options, answer, **_MODEL_EVENT)
    for model_menu, kb_menu in ((model, kb), (other_model, other_kb)):
        model_menu.change(handlers.update_kbs, [model_menu, kb_menu, session], kb_menu, **_MODEL_EVENT)
    evidence_button.click(
        handlers.compare_evidence, [*form, model, kb, where, session], evidence_answer, **_MODEL_EVENT
    )
    models_button.click(
        handlers.compare_models,
        [*form, model, other_model, kb, other_kb, where, session],
        models_answer,
        **_MODEL_EVENT,
    )
    return model, kb


def _filter_field(element: str) -> gr.Textbox:
    """Adds the field of a filter of entities."""
    return gr.Textbox(
        label="Only entities with (optional)",
        lines=1,
        max_length=MAX_FILTER,
        elem_id=element,
        placeholder="type = 'human' and born < 1900",
        info="A condition on the columns of the knowledge base; texts and dates in single quotes.",
    )


def whole_text_tab(handlers: Handlers, model: gr.Dropdown, kb: gr.Dropdown, session: gr.State) -> None:
    """Adds the tab that finds and links all mentions of a text."""
    with gr.Tab("A whole text"):
        gr.Markdown(
            "Paste a text, with its photo if there is one. Every name of the knowledge base in it is found and linked, with the model "
            "and the knowledge base selected on the first page. Words that mean an entity without its name, such as *the "
            "hosts*, are not found: link them on the first page."
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                text = gr.Textbox(
                    EXAMPLE_POST if handlers.examples else "",
                    label="Text",
                    lines=8,
                    max_lines=16,
                    max_length=MAX_TEXT,
                    elem_id="post",
                    placeholder="Georgia drew with Ghana.",
                )
                image = gr.Image(
                    label="Photo (optional)",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=160,
                    elem_id="post-photo",
                )
                image.preprocess = lambda payload: payload and (payload.path or "")  # type: ignore[method-assign,assignment,return-value]
                where = _filter_field("post-where")
                button = gr.Button("Find and link", variant="primary", elem_id="post-go")
            with gr.Column(scale=3, min_width=300):
                answer = gr.HTML(
                    render.message("The text will appear here, with its mentions marked.", "info"),
                    elem_id="post-answer",
                )
    button.click(handlers.annotate_text, [text, image, where, model, kb, session], answer, **_MODEL_EVENT)


def own_entities_tab(handlers: Handlers, model: gr.Dropdown, kb: gr.Dropdown, session: gr.State) -> None:
    """Adds the tab that builds a visitor's own knowledge base and selects it in the menu `kb`."""
    with gr.Tab("Your own entities"):
        gr.Markdown(
            "Link against your own knowledge base. Upload a **.csv** or **.jsonl** file with the columns `id` and `name` "
            "and, optionally, `description`, `attributes`, `aliases` and `image` (a file name in the zip). At most "
            f"{MAX_KB_ROWS:,} entities. Nobody else can see it, and it is deleted after an hour."
        )
        with gr.Row():
            table = gr.File(
                label="Entities (.csv, .tsv, .json, .jsonl)",
                file_types=TABLE_SUFFIXES,
                elem_id="kb-table",
                height=140,
            )
            archive = gr.File(label="Images (.zip, optional)", file_types=[".zip"], elem_id="kb-zip", height=140)
        name = gr.Textbox(label="Name", value="My knowledge base", max_length=60)
        build_button = gr.Button("Check and build", variant="primary")
        message = gr.HTML(elem_id="kb-answer")
        download = gr.File(label="The built knowledge base, for hf_mel", interactive=False, visible=False)
    build_button.click(
        handlers.build_own_kb,
        [name, table, archive, model, session],
        [message, kb, session, download],
        **_MODEL_EVENT,
    )


def many_mentions_tab(handlers: Handlers, model: gr.Dropdown, kb: gr.Dropdown, session: gr.State) -> None:
    """Adds the tab that links a file of mentions."""
    with gr.Tab("Many mentions"):
        gr.Markdown(
            f"Upload a **.csv** or **.jsonl** file with the columns `text` and `mention`, at most {MAX_BATCH_ROWS:,} rows. "
            "They are linked with the model and the knowledge base selected on the first page."
        )
        file = gr.File(
            label="Mentions (.csv, .tsv, .json, .jsonl)",
            file_types=TABLE_SUFFIXES,
            elem_id="batch-file",
            height=140,
        )
        link_button = gr.Button("Link all", variant="primary")
        message = gr.HTML(elem_id="batch-answer")
        table = gr.Dataframe(
            headers=["text", "mention", "entity", "name"],
            interactive=False,
            wrap=True,
            label="First 100 rows",
            visible=False,
            elem_id="batch-table",
        )
        downloads = gr.File(label="Results (CSV, JSON)", file_count="multiple", interactive=False, visible=False)
    link_button.click(
        handlers.link_file, [file, model, kb, session], [message, table, downloads, session], **_MODEL_EVENT
    )
