// What the page tells beside the conversation.

const toasted = document.getElementById("toast");

// Tell a screen reader.
export function say(text) {
  document.getElementById("status").textContent = text;
}

// Show a sentence for a while, perhaps with a button that undoes what it tells.
let timer;
export function toast(text, undoable = false) {
  clearTimeout(timer);
  toasted.firstElementChild.textContent = text;
  toasted.lastElementChild.hidden = !undoable;
  toasted.hidden = false;
  timer = setTimeout(() => (toasted.hidden = true), 10000);
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1200);
  } catch {
    toast("The browser does not let this page copy. Select the text instead.");
  }
}
