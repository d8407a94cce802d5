// Words selected in the caption become the mention. It is done in the page, without a round trip to the server, so that
// whatever a visitor does last wins: an answer that comes late cannot overwrite what was typed meanwhile.
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
      last = ""; // nothing, or all of it to write another caption
      return;
    }
    const seen = `${start} ${end} ${text}`;
    if (seen === last) return; // coming back to the caption restores a selection; that selects nothing anew
    last = seen;

    // Offsets count characters as the server does, where one beyond the first plane is one, not two.
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
          lines.splice(lines.indexOf(words(a, b)), 1); // a selection that grows is one mention
        }
      }
    }
    put(spans, JSON.stringify([...kept, [from, to]]));
    put(mention, [...lines, words(from, to)].join("\n"));
  };
  document.addEventListener("selectionchange", selected);
  document.addEventListener("select", selected, true);

  // On a narrow screen the answer is below the form: go there.
  document.addEventListener("click", (event) => {
    if (event.target.closest("#go, #examples button") && window.innerWidth < 700) {
      document.getElementById("answer")?.scrollIntoView({ behavior: "smooth", block: "start" });
    }
  });
})();
