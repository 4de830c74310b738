// The turns of a conversation as elements.

import { make, show } from "./text.js";

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

// Make a button with an icon. `act` is what it does, and the others say to what.
export function iconButton(name, label, data) {
  const button = make("button", "icon", icon(name));
  button.type = "button";
  button.title = button.ariaLabel = label;
  Object.assign(button.dataset, data);
  return button;
}

// Make the element of a message, the one at `at`.
export function turn(message, at, last, edited) {
  const item = make("article", message.role + (edited ? " edited" : ""));
  const actions = make("div", "actions");
  if (message.role === "user") {
    item.ariaLabel = "You";
    actions.append(iconButton("edit", "Edit", { act: "edit", at }), iconButton("copy", "Copy", { act: "copy", at }));
    item.append(make("div", "text", message.content), actions);
    return item;
  }
  item.ariaLabel = "The model";
  item.append(make("details", "thinking", make("summary"), make("div", "text")), make("div", "text"), make("p", "note"), actions);
  item.firstChild.message = message;
  item.firstChild.open = message.state === "writing" && !message.content;
  update(item, message);
  if (message.state === "writing") return item;
  if (message.content) actions.append(iconButton("copy", "Copy", { act: "copy", at }));
  if (last) actions.append(iconButton("retry", "Retry", { act: "retry" }));
  actions.append(make("span", "facts", message.facts ?? ""));
  return item;
}

// Bring the element of an answer up to date.
export function update(item, message) {
  const [thinking, text, note] = item.children;
  const writing = message.state === "writing";
  const thinks = writing && !message.content;
  if (message.content && !text.firstChild) thinking.open = false;
  thinking.hidden = !message.reasoning;
  thinking.firstChild.textContent = thinks ? "Thinking…" : message.thought ? `Thought for ${message.thought}` : "Thoughts";
  show(thinking.lastChild, message.reasoning ?? "");
  show(text, message.content);
  note.textContent = message.note ?? "";
  note.classList.toggle("bad", message.state === "failed");
  item.classList.toggle("thinks", thinks);
  item.classList.toggle("waits", thinks && !message.reasoning);
}
