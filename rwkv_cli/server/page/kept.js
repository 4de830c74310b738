// Conversations, kept in this browser, one entry of its storage each.

const PREFIX = "rwkv.conversation.";
const SETTINGS = ["system", "think", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
  "frequency_penalty", "penalty_decay", "max_tokens", "seed"];

let storage = null;
try {
  storage = window.localStorage;
} catch {
  // A browser that keeps nothing for any page. Conversations last as long as this page then.
}

export const conversations = new Map();

export function newConversation(model, settings) {
  const id = crypto.getRandomValues(new Uint32Array(3)).join("-");
  return checked({ id, model, settings, messages: [], updated: Date.now() });
}

// Return a conversation with nothing but what it may have, or null where it is none.
function checked(value) {
  if (typeof value?.id !== "string" || !Array.isArray(value.messages)) return null;
  const past = Array.isArray(value.past) ? value.past : [];
  return {
    id: value.id,
    title: text(value.title), // empty for the beginning of the first message
    model: text(value.model),
    updated: Number.isFinite(value.updated) ? value.updated : 0,
    settings: Object.fromEntries(SETTINGS.map((name) => [name, text(value.settings?.[name])])),
    messages: value.messages.map(checkedMessage).filter(Boolean),
    past: past // what undo brings back: the messages from `at` on
      .filter((step) => Number.isInteger(step?.at) && step.at >= 0 && Array.isArray(step.tail))
      .map(({ at, tail }) => ({ at, tail: tail.map(checkedMessage).filter(Boolean) })),
    draft: text(value.draft),
    editing: Number.isInteger(value.editing) && value.messages[value.editing] ? value.editing : null,
    held: text(value.held), // the draft that waits while a turn is edited
  };
}

function checkedMessage(value) {
  if ((value?.role !== "user" && value?.role !== "assistant") || typeof value.content !== "string") return null;
  const message = { role: value.role, content: value.content };
  for (const name of ["reasoning", "thought", "note", "facts"]) if (text(value[name])) message[name] = value[name];
  if (value.state === "writing") message.note = "The page was closed here.";
  if (value.state === "failed") message.state = "failed";
  return message;
}

function text(value) {
  return typeof value === "string" ? value : "";
}

function parsed(json) {
  try {
    return checked(JSON.parse(json));
  } catch {
    return null;
  }
}

// Read all conversations, and tell `changed` about those that another tab changes.
export function load(changed) {
  for (let at = 0; at < (storage?.length ?? 0); at++) {
    const key = storage.key(at);
    const found = key.startsWith(PREFIX) && parsed(storage.getItem(key));
    if (found) conversations.set(found.id, found);
  }
  window.addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(PREFIX)) return;
    const found = newValue && parsed(newValue);
    const id = key.slice(PREFIX.length);
    if (found) conversations.set(id, found);
    else conversations.delete(id);
    changed(id);
  });
}

// Keep a conversation. Return whether there was room.
export function save(conversation) {
  conversations.set(conversation.id, conversation);
  return remember(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function remove(id) {
  conversations.delete(id);
  storage?.removeItem(PREFIX + id);
}

// Keep a text by its name. Return whether there was room.
export function remember(name, value) {
  try {
    storage?.setItem(name, value);
    return storage !== null;
  } catch {
    return false;
  }
}

export function recall(name) {
  return storage?.getItem(name) ?? null;
}

export function exported() {
  return JSON.stringify({ format: "rwkv conversations", version: 1, conversations: [...conversations.values()] }, null, 1);
}

// Take conversations from a file. One that is there already, but differs, stays beside the new one. Return their number.
export function importFrom(json) {
  const found = JSON.parse(json)?.conversations;
  const taken = (Array.isArray(found) ? found : []).map(checked).filter(Boolean);
  if (!taken.length) throw new Error("no conversations");
  for (const conversation of taken) {
    const there = conversations.get(conversation.id);
    if (there && JSON.stringify(there) !== JSON.stringify(conversation)) {
      conversation.id = newConversation().id;
    }
    save(conversation);
  }
  return taken.length;
}
