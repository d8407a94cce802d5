"""The functions behind the buttons: each takes the values of a form and returns HTML, or updates of components."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import render
from service import MAX_MENTIONS, Refused, Service, Session, parse_mentions, read_image, write_results

EXAMPLES = Path(__file__).parent / "examples"
#: A text with names of the knowledge base of the examples.
EXAMPLE_POST = (
    "Georgia drew with Ghana on Saturday. In the other match, Ireland lost to Italy.\n\nFans of Sudan and the Republic of "
    "Korea sang all night."
)


def load_examples(linker: Any) -> list[dict[str, Any]]:
    """Returns the examples of the gallery, or none if the linker's knowledge base lacks one of their entities."""
    examples = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))
    golds = {gold for example in examples for gold in example["gold"]} - {"NIL"}
    return examples if all(gold in linker.kb for gold in golds) else []


class Handlers:
    """The app's functions over one [`Service`].

    Args:
        service ([`Service`]): The models and knowledge bases.
        examples (`list[dict]`): The examples of the gallery.
    """

    def __init__(self, service: Service, examples: list[dict[str, Any]]):
        self.service, self.examples = service, examples

    def answer(self, text, mentions, spans, image, model, kb, top_k, threshold, where, session, note=""):
        """Links the mentions of a caption; returns the answers as HTML."""
        try:
            picture = read_image(image)
            results, seconds = self.service.link(
                text or "",
                parse_mentions(text or "", mentions, spans),
                picture,
                model=model,
                kb=kb,
                session=session,
                top_k=top_k or 5,
                nil_threshold=threshold,
                where=where,
            )
            linker = self.service.linker(model, kb, session)
            answers = []
            for result in results:
                images = _candidate_images(linker, result)
                explanation = self.service.explain(text, picture, result, linker)
                evidence = render.evidence(text, explanation, picture, images[0], result.best.name)
                answers.append({"result": result, "images": images, "evidence": evidence})
            return render.results(answers, seconds, note)
        except Refused as refused:
            return render.message(str(refused))

    def annotate_text(self, text, image, where, model, kb, session):
        """Finds and links the mentions of a text; returns the marked text with the evidence of each as HTML."""
        try:
            picture = read_image(image)
            options = {"model": model, "kb": kb, "session": session, "where": where}
            annotated, seconds = self.service.annotate(text or "", picture, **options)
            linker = self.service.linker(model, kb, session)
            answers = []
            for number, mention in enumerate(annotated.mentions):
                answer = {"result": mention.link, "images": _candidate_images(linker, mention.link)}
                if number < MAX_MENTIONS:  # explaining takes as long as linking
                    explanation = self.service.explain(text, picture, mention.link, linker)
                    name = mention.link.best.name
                    answer["evidence"] = render.evidence(text, explanation, picture, answer["images"][0], name)
                answers.append(answer)
            return render.annotated_text(text, answers, seconds)
        except Refused as refused:
            return render.message(str(refused))

    def example_form(self, number: int) -> list[str]:
        """Returns the form values of an example: caption, mentions, spans and photo."""
        example = self.examples[number]
        mentions, spans = "\n".join(example["mentions"]), json.dumps(example["spans"])
        return [example["text"], mentions, spans, str(EXAMPLES / example["image"])]

    def answer_example(self, number: int, model, kb, top_k, threshold, where, session):
        """Links the mentions of an example; returns the answers as HTML."""
        text, mentions, spans, image = self.example_form(number)
        note = self.examples[number]["note"]
        return self.answer(text, mentions, spans, image, model, kb, top_k, threshold, where, session, note)

    def compare_evidence(self, text, mentions, spans, image, model, kb, where, session):
        """Links the first mention with all scoring units, then with each alone; returns the columns as HTML."""
        try:
            picture = read_image(image)
            asked = (text or "", parse_mentions(text or "", mentions, spans)[:1], picture)
            options = {"model": model, "kb": kb, "session": session, "top_k": 3, "where": where}
            (result,), _ = self.service.link(*asked, **options)
            linker = self.service.linker(model, kb, session)
            columns = [("All together", result, _candidate_images(linker, result))]
            units = result.best.unit_scores
            if len(units) < 2:  # a warning says so if that is for want of a photo
                words = ["The model uses one kind of evidence here, so there is nothing to compare.", *result.warnings]
                return render.message(" ".join(words), "info")
            for unit in units:
                (result,), _ = self.service.link(*asked, units=[unit], **options)
                columns.append((f"{render.unit_name(unit)} alone", result, _candidate_images(linker, result)))
            note = "No photo was given, so the columns that need one mean nothing: the model reads a blank picture."
            if picture or getattr(linker.model, "leaves_out_missing_images", None):
                note = ""
            return render.comparison(columns, note)
        except Refused as refused:
            return render.message(str(refused))

    def compare_models(self, text, mentions, spans, image, model, other, kb, other_kb, where, session):
        """Links the first mention with two models; returns the columns as HTML."""
        try:
            picture = read_image(image)
            asked = (text or "", parse_mentions(text or "", mentions, spans)[:1], picture)
            columns = []
            for name, base in ((model, kb), (other, other_kb)):
                options = {"model": name, "kb": base, "session": session, "top_k": 5, "where": where}
                (result,), _ = self.service.link(*asked, **options)
                images = _candidate_images(self.service.linker(name, base, session), result)
                columns.append((f"{name} · {base}", result, images))
            return render.comparison(columns)
        except Refused as refused:
            return render.message(str(refused))

    def update_kbs(self, model: str, kb: str, session: Session):
        """Returns the knowledge bases to choose from for a model: those it built."""
        choices = self.service.fitting_kbs(model, session)
        return gr.update(choices=choices, value=kb if kb in choices else next(iter(choices), None))

    def build_own_kb(self, name, table, archive, model, session, progress=gr.Progress()):
        """Builds a visitor's knowledge base; returns a message, the choices, the session and the file to download."""
        try:
            if table is None:
                raise Refused("Choose the table of your entities first.")
            progress(0.1, "Checking the rows and encoding the entities")
            label, count, left_out = self.service.build_kb(name, table, archive, model=model, session=session)
            words = (
                f"All rows are valid: “{label}” is ready, with {count:,} entities. It is selected on the first page and "
                "will be deleted in an hour."
            )
            if left_out:
                more = [f"… and {len(left_out) - 10:,} more."] if len(left_out) > 10 else []
                words += f"\nImages left out, because they are missing or damaged: {len(left_out):,}.\n"
                words += "\n".join(left_out[:10] + more)
            choices = gr.update(choices=self.service.fitting_kbs(model, session), value=label)
            file = gr.update(value=self.service.download_kb(label, session), visible=True)
            return render.message(words, "info"), choices, session, file
        except Refused as refused:
            return render.message(str(refused)), gr.update(), session, gr.update(value=None, visible=False)

    def link_file(self, path, model, kb, session, progress=gr.Progress()):
        """Links a file of mentions; returns a message, the first rows, the files of results and the session."""
        try:
            if path is None:
                raise Refused("Choose a file of mentions first.")
            rows = self.service.link_batch(path, model=model, kb=kb, session=session, progress=progress)
        except Refused as refused:
            return render.message(str(refused)), gr.update(visible=False), gr.update(visible=False), session
        failed = sum("error" in row for row in rows)
        words = f"{len(rows) - failed:,} of {len(rows):,} mentions linked" + (
            "; the last column says why the others failed." if failed else "."
        )
        table = [
            [row["text"], row["mention"], row.get("entity_id", ""), row.get("name", row.get("error", ""))]
            for row in rows[:100]
        ]
        files = list(write_results(rows, Path(tempfile.mkdtemp(dir=session.folder))))
        return (
            render.message(words, "info"),
            gr.update(value=table, visible=True),
            gr.update(value=files, visible=True),
            session,
        )


def _candidate_images(linker: Any, result: Any) -> list[Any]:
    return [linker.kb.image(linker.kb.row_of(candidate.entity_id)) for candidate in result.candidates]
