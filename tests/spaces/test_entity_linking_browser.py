"""Tests of the demo Space in a real browser: a visitor's actions, results and mistakes. They need Chromium.

If `MEL_SCREENSHOTS` names a folder, screenshots are saved there.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.spaces.small_model import small_model
from tests.spaces.test_entity_linking import SPACE, entities_csv, png, zipped

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
expect = sync_api.expect
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    root = tmp_path_factory.mktemp("space")
    small_model(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "uploads"))
        patch.setattr(sys, "path", [str(SPACE), *sys.path])
        import app
        import service

        demo = app.build(
            service.Service(
                {"small": str(root / "model"), "small again": str(root / "model")},
                {"flags": str(root / "model" / "kb")},
            )
        )
        _, url, _ = app.launch(demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        yield url
        demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """Opens the app in a new window. Script errors and requests to other hosts fail the test."""
    contexts, errors = [], []

    def open_page(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"a script opened a window: {dialog.message}"))
        page.on(
            "request",
            lambda sent: errors.append(sent.url) if not sent.url.startswith((url, "data:", "blob:")) else None,
        )
        page.goto(url)
        expect(page.locator("#answer .mel-card").first).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def page(open_page):
    return open_page()


def screenshot(page, name: str) -> None:
    if folder := os.environ.get("MEL_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def ask(page, text: str, mention: str | None = None) -> None:
    page.locator("#caption textarea").fill(text)
    if mention is not None:
        page.locator("#mention").locator("textarea, input").first.fill(mention)


def press(page, label: str) -> None:
    page.get_by_role("button", name=label, exact=True).click()


def test_the_first_screen_shows_a_linked_mention_and_its_explanation(page):
    decision = page.locator("#answer .mel-decision").first
    expect(decision).to_contain_text("the Koreans")
    expect(decision).to_contain_text("Ahead of")
    expect(page.locator("#answer .mel-expect")).to_contain_text("both Koreas")
    assert page.locator("#answer .mel-card").count() == 5
    assert page.locator("#answer .mel-bar").count() == 5
    expect(page.locator("#answer .mel-words mark").first).to_be_visible()
    screenshot(page, "first_screen")


def mention_box(page):
    return page.locator("#mention textarea")


def mark(page, start: int, end: int) -> None:
    """Selects characters of the caption with the keyboard."""
    box = page.locator("#caption textarea")
    box.press("Control+Home")
    for _ in range(start):
        box.press("ArrowRight")
    for _ in range(end - start):
        box.press("Shift+ArrowRight")


def test_words_selected_with_the_keyboard_become_the_mention(page):
    ask(page, "A day in Jordan with friends")
    mark(page, 8, 16)  # includes the spaces around the word
    expect(mention_box(page)).to_have_value("Jordan")
    press(page, "Link")
    expect(page.locator("#answer .mel-decision")).to_contain_text("Jordan →")


def test_words_selected_with_the_mouse_become_the_mention(page):
    ask(page, "Jordan")
    page.locator("#caption textarea").fill("Jordan is a place")
    page.locator("#caption textarea").dblclick(position={"x": 25, "y": 20})
    expect(mention_box(page)).to_have_value("Jordan")


def test_the_last_action_of_a_visitor_determines_the_mention(page):
    ask(page, "Georgia met Jordan")
    mark(page, 0, 7)
    expect(mention_box(page)).to_have_value("Georgia")
    mention_box(page).fill("Jordan")  # typed after the selection
    page.locator("#caption textarea").focus()  # restores the old selection, which must be ignored
    page.wait_for_timeout(300)
    assert mention_box(page).input_value() == "Jordan"
    mark(page, 0, 7)  # the same words, selected again
    expect(mention_box(page)).to_have_value("Georgia")


def test_the_second_of_two_equal_words_can_be_selected(page):
    """The selection counts code points, also after a character that JavaScript counts twice."""
    ask(page, "😀 Georgia met Georgia")
    mark(page, 14, 21)
    expect(mention_box(page)).to_have_value("Georgia")
    assert json.loads(page.locator("#spans textarea").input_value()) == [[14, 21]]
    press(page, "Link")
    expect(page.locator("#answer .mel-decision")).to_contain_text("Georgia →")


def test_several_mentions_can_be_selected_in_turn(page):
    ask(page, "Georgia met Georgia in Jordan", "")
    page.locator("#several input").check()
    for start, end in ((0, 7), (12, 19), (23, 29)):
        mark(page, start, end)
    expect(mention_box(page)).to_have_value("Georgia\nGeorgia\nJordan")
    press(page, "Link")
    expect(page.locator("#answer .mel-answer")).to_have_count(3)


def test_an_uploaded_photo_is_used(page, tmp_path):
    Image.new("RGB", (64, 48), "green").save(tmp_path / "photo.png")
    ask(page, "The hosts waved.", "The hosts")
    page.locator("#photo").get_by_role("button", name=re.compile("clear|remove", re.I)).first.click()
    press(page, "Link")
    expect(page.locator("#answer .mel-note").first).to_contain_text("The mention has no image")
    page.locator("#photo input[type=file]").first.set_input_files(str(tmp_path / "photo.png"))
    expect(page.locator("#photo img").first).to_be_visible()
    press(page, "Link")
    expect(page.locator("#answer .mel-note")).to_have_count(0)
    expect(page.locator("#answer .mel-figures img").first).to_be_visible()


def test_an_example_fills_the_form_and_links_its_mentions(page):
    page.get_by_role("button", name="Two mentions in one caption").click()
    expect(page.locator("#answer .mel-answer")).to_have_count(2)
    expect(page.locator("#caption textarea")).to_have_value(re.compile("Samoans"))
    screenshot(page, "two_mentions")


def test_units_can_be_chosen_and_two_models_compared(page):
    page.get_by_role("tab", name="Text alone / image alone / all").click()
    press(page, "Compare the kinds of evidence")
    expect(page.locator("#units .mel-column")).to_have_count(4)
    screenshot(page, "compare")
    page.get_by_role("tab", name="Two models").click()
    press(page, "Compare the models")
    expect(page.locator("#models .mel-column")).to_have_count(2)
    first, second = page.locator("#models .mel-column ol").all_inner_texts()
    assert first == second  # both names are the same model


@pytest.mark.parametrize(
    ("text", "mention", "words"),
    [
        ("", "", "Paste a caption or a text first"),
        ("Georgia won.", "", "Say which words to link"),
        ("Georgia won.", "Peru", "“Peru” is not in the caption"),
        ("<img src=x onerror=alert(1)>", "<b>", "“<b>” is not in the caption"),
    ],
)
def test_a_message_names_missing_input(page, text, mention, words):
    ask(page, text, mention)
    press(page, "Link")
    expect(page.locator("#answer [role=alert]")).to_contain_text(words)


def test_scripts_in_captions_and_names_are_shown_as_text(page, tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    ask(page, f"{evil} won.", evil)
    press(page, "Link")
    expect(page.locator("#answer .mel-decision")).to_contain_text(evil)
    own_kb(page, entities_csv(tmp_path / "evil.csv", [["1", evil, evil, ""]]))
    expect(page.locator("#kb-answer")).to_contain_text("1 entities")
    page.get_by_role("tab", name="Link a mention").click()
    press(page, "Link")
    expect(page.locator("#answer .mel-card")).to_have_count(1)
    expect(page.locator("#answer .mel-card h3")).to_contain_text(evil)
    assert page.locator("#answer img[src=x]").count() == 0


def test_a_whole_text_is_annotated_and_a_click_shows_the_evidence(page):
    page.get_by_role("tab", name="A whole text").click()
    press(page, "Find and link")
    mentions = page.locator("#post-answer .mel-mention")
    expect(mentions.first).to_be_visible()
    assert mentions.all_inner_texts()[:4] == ["Georgia", "Ghana", "Ireland", "Italy"]
    shown = page.locator("#post-answer .mel-found:visible")
    expect(shown).to_have_count(1)
    expect(shown.locator(".mel-decision")).to_contain_text("Georgia")
    screenshot(page, "whole_text")
    mentions.nth(2).click()
    expect(shown).to_have_count(1)
    expect(shown.locator(".mel-decision q")).to_have_text("Ireland")
    expect(mentions.nth(2)).to_have_attribute("aria-expanded", "true")
    expect(mentions.first).to_have_attribute("aria-expanded", "false")
    screenshot(page, "whole_text_click")
    page.locator("#post textarea").fill("<img src=x onerror=alert(1)> \u05d0 Ghana")
    press(page, "Find and link")
    expect(mentions).to_have_count(1)
    assert page.locator("#post-answer img[src=x]").count() == 0
    for text, words in (("nobody", "No name of the knowledge base"), ("", "Paste a caption or a text first")):
        page.locator("#post textarea").fill(text)
        press(page, "Find and link")
        expect(page.locator("#post-answer [role=alert]")).to_contain_text(words)


def test_a_constraint_limits_the_entities_of_both_tabs(page):
    def constrain(element, condition, button):
        page.locator(element).locator("textarea, input").first.fill(condition)
        press(page, button)

    page.get_by_role("button", name="Model, knowledge base, options").click()
    ask(page, "Georgia won.", "Georgia")
    constrain("#where", "name in ('Ghana', 'Togo')", "Link")
    expect(page.locator("#answer .mel-card")).to_have_count(2)
    screenshot(page, "constraint")
    constrain("#where", "born < 1900", "Link")
    expect(page.locator("#answer [role=alert]")).to_contain_text("no column 'born'")
    page.get_by_role("tab", name="A whole text").click()
    constrain("#post-where", "name = 'Ghana'", "Find and link")
    decision = page.locator("#post-answer .mel-found:visible .mel-decision")
    expect(decision).to_contain_text("Georgia")
    expect(decision).to_contain_text("Ghana")
    screenshot(page, "whole_text_constraint")
    constrain("#post-where", "name = '<img src=x onerror=alert(1)>'", "Find and link")
    expect(page.locator("#post-answer [role=alert]")).to_contain_text("None of the 129 entities passes")
    assert page.locator("#post-answer img[src=x]").count() == 0
    constrain("#post-where", "", "Find and link")
    expect(page.locator("#post-answer .mel-found .mel-card").nth(3)).to_be_attached()


def test_a_whole_text_fits_a_narrow_screen(open_page):
    page = open_page(width=390, height=800)
    page.get_by_role("tab", name="A whole text").click()
    press(page, "Find and link")
    expect(page.locator("#post-answer .mel-mention").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "whole_text_narrow")


def own_kb(page, table: Path, archive: Path | None = None) -> None:
    page.get_by_role("tab", name="Your own entities").click()
    page.locator("#kb-table input[type=file]").set_input_files(str(table))
    expect(page.locator("#kb-table")).to_contain_text(table.stem[:4])
    if archive is not None:
        page.locator("#kb-zip input[type=file]").set_input_files(str(archive))
        expect(page.locator("#kb-zip")).to_contain_text(archive.stem[:4])
    press(page, "Check and build")


def test_a_visitor_builds_a_knowledge_base_and_links_with_it(page, open_page, tmp_path):
    rows = [["1", "Jo", "a cat", "jo.png"], ["2", "Al", "a dog", ""]]
    own_kb(page, entities_csv(tmp_path / "pets.csv", rows), zipped(tmp_path / "images.zip", {"jo.png": png()}))
    expect(page.locator("#kb-answer")).to_contain_text("2 entities")
    with page.expect_download() as download:
        page.locator("a[download]").last.click()
    assert download.value.suggested_filename.endswith(".zip")
    screenshot(page, "own_kb")
    page.get_by_role("tab", name="Link a mention").click()
    ask(page, "Jo sleeps", "Jo")
    press(page, "Link")
    expect(page.locator("#answer .mel-card")).to_have_count(2)
    stranger = open_page()
    stranger.get_by_role("button", name="Model, knowledge base, options").click()
    stranger.locator("#kb input").click()
    expect(stranger.get_by_role("option", name="flags")).to_be_visible()
    assert stranger.get_by_role("option", name="yours").count() == 0


def test_invalid_rows_of_an_uploaded_table_are_listed(page, tmp_path):
    own_kb(page, entities_csv(tmp_path / "bad.csv", [["1", "", "", ""], ["2", "", "a dog", ""]]))
    expect(page.locator("#kb-answer [role=alert]")).to_contain_text("2 rows cannot be used")
    expect(page.locator("#kb-answer [role=alert]")).to_contain_text("Row 3")
    screenshot(page, "own_kb_bad_rows")


# Remembers whether the page ever had a progress bar.
WATCH_FOR_BAR = """() => {
 window.sawBar = false;
 new MutationObserver(() => { window.sawBar ||= document.querySelector("#batch-answer .progress-bar") !== null; })
  .observe(document.body, {childList: true, subtree: true});
}"""


def test_a_batch_file_gives_result_files(page, tmp_path):
    with (tmp_path / "mentions.csv").open("w", newline="") as out:
        rows = [["Georgia won", "Georgia"], ["In Jordan", "Peru"]] * 150
        csv.writer(out).writerows([["text", "mention"], *rows])
    page.get_by_role("tab", name="Many mentions").click()
    page.locator("#batch-file input[type=file]").set_input_files(str(tmp_path / "mentions.csv"))
    expect(page.locator("#batch-file")).to_contain_text("ment")
    page.evaluate(WATCH_FOR_BAR)  # a quick machine shows it for less time than passes between two looks
    press(page, "Link all")
    expect(page.locator("#batch-answer")).to_contain_text("150 of 300 mentions linked")
    assert page.evaluate("window.sawBar")
    with page.expect_download() as download:
        page.locator("a[download*='json']").first.click()
    rows = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert [row["mention"] for row in rows] == ["Georgia", "Peru"] * 150
    screenshot(page, "batch")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_is_readable_in_both_colour_schemes(open_page, scheme):
    page = open_page(390, 844, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, f"phone_{scheme}")
    assert not page.evaluate(PALE)


# Texts with a contrast below 4.5 (WCAG 2).
PALE = """() => {
    const parts = c => c.startsWith('rgb') ? c.match(/[0-9.]+/g).map(Number) : null;
    const luminance = c => c.slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const c = parts(getComputedStyle(e).backgroundColor);
            if (c && (c.length < 4 || c[3] === 1)) return c;
        }
        return [255, 255, 255];
    };
    const pale = [];
    for (const e of document.querySelectorAll('body *')) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        let opacity = 1;
        for (let p = e; p; p = p.parentElement) opacity *= getComputedStyle(p).opacity;
        const back = behind(e), front = parts(getComputedStyle(e).color);
        if (!front) continue;
        const seen = front.slice(0, 3).map((v, i) => opacity * v + (1 - opacity) * back[i]);
        const [one, two] = [luminance(seen), luminance(back)];
        const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        if (ratio < 4.5) pale.push(e.className + ': ' + e.textContent.trim().slice(0, 40) + ' ' + ratio.toFixed(2));
    }
    return pale;
}"""


def test_every_control_has_a_name_and_is_reachable_by_keyboard(page):
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea')]
        .filter(e => e.offsetParent !== null && e.type !== 'file')
        .filter(e => !(e.getAttribute('aria-label') || e.title || e.innerText || e.labels?.length || e.placeholder))
        .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert not unnamed
    page.locator("#caption textarea").focus()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id + ' ' + document.activeElement.innerText.slice(0, 20)")
        )
    assert any("Link" in name for name in reached)
