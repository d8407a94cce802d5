// Makes the words that a visitor selects in the caption the mention. This runs in the page, without the server, so that a
// late response cannot overwrite what the visitor typed in the meantime.
(() => {
  const field = (id) => document.querySelector(`#${id} textarea, #${id} input[type=text]`);
  const put = (box, value) => {
    box.value = value;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const spansOf = (box) => {
    try {
      return JSON.parse(box.value || "[]");
    } catch {
      return [];
    }
  };
  let last = "";

  const selected = () => {
    const caption = field("caption");
    if (!caption || document.activeElement !== caption) return;
    const text = caption.value;
    let [start, end] = [caption.selectionStart, caption.selectionEnd];
    while (start < end && /\s/.test(text[start])) start++;
    while (start < end && /\s/.test(text[end - 1])) end--;
    if (start === end || end - start === text.trim().length) {
      last = ""; // nothing is selected, or everything, in order to replace the caption
      return;
    }
    const seen = `${start} ${end} ${text}`;
    if (seen === last) return; // the browser restored an old selection when the caption got the focus
    last = seen;

    // Offsets count code points, as the server does; JavaScript counts characters beyond the first plane twice.
    const [from, to] = [start, end].map((at) => [...text.slice(0, at)].length);
    const words = (a, b) => [...text].slice(a, b).join("").replace(/\n/g, " ");
    const [mention, spans] = [field("mention"), field("spans")];
    let [lines, kept] = [[], []];
    if (document.querySelector("#several input").checked) {
      lines = mention.value.split("\n").filter((line) => line.trim());
      for (const [a, b] of spansOf(spans)) {
        if (b <= from || to <= a) {
          kept.push([a, b]);
        } else if (lines.includes(words(a, b))) {
          lines.splice(lines.indexOf(words(a, b)), 1); // the new selection replaces an overlapping one
        }
      }
    }
    put(spans, JSON.stringify([...kept, [from, to]]));
    put(mention, [...lines, words(from, to)].join("\n"));
  };
  document.addEventListener("selectionchange", selected);
  document.addEventListener("select", selected, true);

  // Scroll to the answer, which is below the form on a narrow screen.
  document.addEventListener("click", (event) => {
    if (event.target.closest("#go, #examples button") && window.innerWidth < 700) {
      document.getElementById("answer")?.scrollIntoView({ behavior: "smooth", block: "start" });
    }
  });
})();
