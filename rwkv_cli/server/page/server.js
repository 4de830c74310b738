// What the page asks of the server: its models, and answers as they come.

export class ServerError extends Error {
  // A status of 0 means that no answer came, or only the beginning of one.
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// Return the names of the models.
export async function models(key) {
  const response = await ask("v1/models", key, {});
  return (await response.json()).data.map((model) => model.id);
}

// Yield the events of an answer. Throws ServerError, and the signal's reason once that stops it.
export async function* answer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await ask("v1/chat/completions", key, { method: "POST", body, signal });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message, 500);
    yield event;
  }
  throw new ServerError("The server went away before the end of the answer.");
}

async function ask(path, key, options) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    options.signal?.throwIfAborted();
    throw new ServerError("The server does not answer. It may have stopped.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new ServerError(told?.error?.message ?? `The server says ${response.status}.`, response.status);
}

// Yield the data of server-sent events. Characters and events may be cut anywhere between two reads.
async function* events(stream, signal) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  for (let held = ""; ; ) {
    let read;
    try {
      read = await reader.read();
    } catch {
      signal.throwIfAborted();
      throw new ServerError("The server went away before the end of the answer.");
    }
    held += decoder.decode(read.value, { stream: !read.done });
    const parts = held.split(/\r?\n\r?\n/);
    held = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
    if (read.done) return;
  }
}
