// Shows the evidence of the mention that is clicked in an annotated text. The server sent it with the text.
document.addEventListener("click", (event) => {
  const mention = event.target.closest?.(".mel-mention");
  if (!mention) return;
  const post = mention.closest(".mel-post");
  for (const other of post.querySelectorAll(".mel-mention")) {
    other.setAttribute("aria-expanded", String(other === mention));
  }
  for (const found of post.querySelectorAll(".mel-found")) {
    found.hidden = found.dataset.mention !== mention.dataset.mention;
  }
});
