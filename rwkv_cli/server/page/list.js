// The list of conversations.

import { title } from "./talk.js";
import { make } from "./text.js";
import { iconButton } from "./turns.js";

// Draw the list, the latest first. The focus stays where it is, and a name that is being typed is left alone.
export function drawItems(list, talks, current, running) {
  const focused = document.activeElement?.closest("#list li")?.dataset.id;
  if (document.activeElement?.matches("#list input")) return;
  talks.sort((a, b) => b.updated - a.updated);
  const items = talks.map((talk) => {
    const open = make("button", "open", title(talk));
    open.dataset.act = "open";
    if (talk === current) open.setAttribute("aria-current", "true");
    const item = make("li", running.has(talk.id) ? "busy" : "", open);
    item.dataset.id = talk.id;
    item.append(iconButton("edit", `Rename ${title(talk)}`, { act: "rename" }));
    item.append(iconButton("trash", `Delete ${title(talk)}`, { act: "delete" }));
    return item;
  });
  list.replaceChildren(...items);
  items.find((item) => item.dataset.id === focused)?.firstChild.focus();
}

// Ask for a name in place of an item's text. It is null where Escape was pressed.
export function askForName(item, name, done) {
  const input = make("input");
  input.value = name;
  input.ariaLabel = "Name";
  item.firstChild.replaceWith(input);
  input.select();
  const end = (taken) => {
    input.onblur = null;
    input.blur();
    done(taken ? input.value.trim() : null);
  };
  input.onblur = () => end(true);
  input.onkeydown = (event) => {
    event.stopPropagation();
    if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
    event.preventDefault(); // or the same key would press the button that gets the focus
    end(event.key === "Enter");
    document.querySelector(`[data-id="${CSS.escape(item.dataset.id)}"] .open`)?.focus();
  };
}
