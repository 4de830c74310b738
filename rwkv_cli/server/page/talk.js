// What happens to a conversation, apart from how it looks.

// Replace the messages from `at` on. Undo brings them back.
export function change(talk, at, added) {
  talk.past.push({ at, tail: talk.messages.slice(at) });
  talk.past.splice(0, talk.past.length - 50);
  talk.messages = [...talk.messages.slice(0, at), ...added];
}

// Take back the last change. A text that it sent becomes the draft again.
export function undo(talk) {
  const { at, tail } = talk.past.pop();
  const typed = talk.messages[at];
  talk.messages = [...talk.messages.slice(0, at), ...tail];
  if (talk.editing !== null) endEditing(talk);
  if (typed?.role === "user" && typed.content !== tail[0]?.content) talk.draft = joined(typed.content, talk.draft);
}

// Make a sent turn the draft. What was the draft waits.
export function edit(talk, at) {
  if (talk.editing === null) talk.held = talk.draft;
  talk.editing = at;
  talk.draft = talk.messages[at].content;
}

export function endEditing(talk) {
  talk.draft = talk.editing === null ? "" : talk.held;
  talk.editing = null;
  talk.held = "";
}

export function title(talk) {
  return talk.title || talk.messages[0]?.content.trim().split("\n")[0].slice(0, 80) || "New conversation";
}

// Return the request for the next answer. Answers that are empty are left out, and turns of one side joined.
export function request(talk) {
  const { system, think, ...numbers } = talk.settings;
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { role, content } of talk.messages) {
    if (role === "assistant" && !content) continue;
    if (messages.at(-1)?.role === role) messages.at(-1).content = joined(messages.at(-1).content, content);
    else messages.push({ role, content });
  }
  const given = Object.entries(numbers).filter(([, value]) => value !== "");
  return {
    model: talk.model || undefined,
    messages,
    think: think || undefined,
    ...Object.fromEntries(given.map(([name, value]) => [name, Number(value)])),
  };
}

// Say how much an answer was, and how fast since `first`, the time of its first text.
export function facts(usage, first, model) {
  const seconds = (performance.now() - first) / 1000;
  const tokens = usage.completion_tokens;
  const speed = first && tokens > 4 ? `, ${Math.round((tokens - 1) / seconds)} a second` : "";
  return `${model ?? ""} · ${tokens} ${tokens === 1 ? "token" : "tokens"}${speed}`;
}

function joined(...texts) {
  return texts.filter(Boolean).join("\n\n");
}
