// The page: one conversation at a time, the list of all, and the settings.

import * as kept from "./kept.js";
import { askForName, drawItems } from "./list.js";
import { copy, say, toast } from "./notices.js";
import { answer, models, ServerError } from "./server.js";
import { change, edit, endEditing, facts, request, title, undo } from "./talk.js";
import { make } from "./text.js";
import { turn, update } from "./turns.js";

const $ = (id) => document.getElementById(id);
const running = new Map(); // what stops the answer that a conversation is getting, by the conversation's id
let current; // the conversation that is shown
let key = sessionStorage.getItem("rwkv.key") ?? "";
let retried = () => {}; // what happens again after an error, or once there is a key
let deleted = null; // the conversation that the toast can bring back

// --- The conversation ---

function send() {
  const text = $("draft").value.trim();
  if (!text || running.has(current.id)) return;
  change(current, current.editing ?? current.messages.length, [{ role: "user", content: text }]);
  endEditing(current);
  reply(current);
}

function retry() {
  const at = current.messages.length - 1;
  if (at < 0 || running.has(current.id)) return;
  if (current.messages[at].role === "assistant") change(current, at, []);
  reply(current);
}

function takeBack() {
  if (!current.past.length) return;
  stop();
  undo(current);
  drawKept();
  $("draft").focus();
}

function editTurn(at) {
  edit(current, at);
  drawKept();
  $("draft").focus();
}

function leaveEditing() {
  endEditing(current);
  drawKept();
  $("draft").focus();
}

function stop() {
  running.get(current.id)?.abort("Stopped.");
}

// Get an answer. What has come stays, whatever happens.
async function reply(talk) {
  const asked = request(talk);
  const message = { role: "assistant", content: "", reasoning: "", state: "writing" };
  const controller = new AbortController();
  talk.messages.push(message);
  talk.updated = Date.now();
  running.set(talk.id, controller);
  drawKept();
  toEnd();
  say("The model answers.");
  const began = performance.now();
  let first = 0; // when the first text came
  try {
    for await (const event of answer(asked, key, controller.signal)) {
      const [choice] = event.choices;
      if (event.usage) message.facts = facts(event.usage, first, asked.model);
      if (choice?.finish_reason === "length") message.note = "The limit of tokens ends the answer here.";
      const { reasoning_content: reasoning = "", content = "" } = choice?.delta ?? {};
      if (!reasoning && !content) continue;
      first ||= performance.now();
      if (content && message.reasoning) message.thought ??= `${Math.ceil((performance.now() - began) / 1000)} s`;
      message.reasoning += reasoning;
      message.content += content;
      drawSoon(talk);
    }
    message.state = "done";
    say(`The model says: ${message.content}`);
  } catch (error) {
    const { aborted, reason } = controller.signal;
    message.state = aborted ? "stopped" : "failed";
    message.note = aborted ? reason : error.message;
    say(message.note);
    if (error.status === 401) askForKey(() => current === talk && retry());
    else if (!aborted && !(error instanceof ServerError)) console.error(error);
  }
  if (running.get(talk.id) === controller) running.delete(talk.id);
  talk.updated = Date.now();
  keep(talk);
  if (talk === current) draw();
  else drawList();
}

// --- What is shown ---

function draw() {
  const busy = running.has(current.id);
  const [atEnd, end] = [isAtEnd(), current.messages.length - 1];
  const opened = [...$("log").querySelectorAll("details[open]")].map((thinking) => thinking.message);
  $("log").replaceChildren(...current.messages.map((message, at) => turn(message, at, at === end, at === current.editing)));
  for (const thinking of $("log").querySelectorAll("details")) thinking.open ||= opened.includes(thinking.message);
  $("empty").hidden = current.messages.length > 0;
  $("draft").value = current.draft;
  $("editing").hidden = current.editing === null;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("log").ariaBusy = busy;
  $("undo").disabled = !current.past.length;
  document.title = current.messages.length ? `${title(current)} · rwkv` : "rwkv";
  if ([...$("model").options].some((option) => option.value === current.model)) $("model").value = current.model;
  else current.model = $("model").value || current.model;
  grow();
  if (atEnd) toEnd();
  drawList();
}

// Show a change, and keep it.
function drawKept() {
  keep(current);
  draw();
}

let drawing = false;
function drawSoon(talk) {
  if (talk === current && !drawing) {
    drawing = true;
    requestAnimationFrame(() => {
      drawing = false;
      const message = current.messages.at(-1);
      if (!running.has(current.id) || message?.role !== "assistant") return;
      const atEnd = isAtEnd();
      update($("log").lastElementChild, message);
      if (atEnd) toEnd();
    });
  }
  keepSoon(talk);
}

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  return scrollHeight - scrollTop - clientHeight < 60;
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function grow() {
  $("draft").style.height = "auto";
  $("draft").style.height = `${$("draft").scrollHeight}px`;
}

function fail(text, again) {
  $("error").hidden = !text;
  $("error").firstElementChild.textContent = text;
  $("again").hidden = !again;
  retried = again ?? (() => {});
}

// --- The list ---

function drawList() {
  const talks = [...kept.conversations.values()].filter((talk) => talk.messages.length || talk.draft || talk === current);
  drawItems($("list"), talks, current, running);
}

function open(talk) {
  current = talk;
  kept.remember("rwkv.open", talk.id);
  fillSettings();
  draw();
  toEnd();
}

function openNew() {
  const empty = [...kept.conversations.values()].find((talk) => !talk.messages.length && !talk.draft);
  const { model, settings } = kept.newConversation($("model").value, current?.settings);
  open(Object.assign(empty ?? kept.newConversation(), { model, settings, updated: Date.now() }));
  keep(current);
  drawList();
  showSide(false);
  $("draft").focus();
}

function rename(talk, item) {
  askForName(item, title(talk), (name) => {
    talk.title = name ?? talk.title;
    keep(talk);
    draw();
  });
}

function remove(talk) {
  running.get(talk.id)?.abort("Stopped.");
  kept.remove(talk.id);
  deleted = talk;
  toast(`“${title(talk)}” is deleted.`, true);
  if (talk === current) openNew();
  else drawList();
}

// --- Keeping ---

const unkept = new Map();
function keepSoon(talk) {
  if (!unkept.has(talk)) unkept.set(talk, setTimeout(() => keep(talk), 300));
}

function keep(talk) {
  clearTimeout(unkept.get(talk));
  unkept.delete(talk);
  if (talk === deleted) return;
  if (!kept.save(talk)) toast("This browser has no room to keep this. Export conversations, and delete some.");
}

function download() {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([kept.exported()], { type: "application/json" }));
  link.download = `conversations-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function upload() {
  try {
    const number = kept.importFrom(await $("file").files[0].text());
    toast(`${number} ${number === 1 ? "conversation was" : "conversations were"} imported.`);
  } catch {
    toast("This file holds no conversations.");
  }
  $("file").value = "";
  const again = kept.conversations.get(current.id);
  if (again && !running.has(current.id)) open(again);
}

// --- Settings, models, key, colours ---

const fields = () => [...$("settings").querySelectorAll("[name]")];

function fillSettings() {
  for (const field of fields()) field.value = current.settings[field.name];
}

function takeSettings() {
  for (const field of fields()) if (field.validity.valid) current.settings[field.name] = field.value;
  keepSoon(current);
}

async function loadModels() {
  try {
    const names = await models(key);
    $("model").replaceChildren(...names.map((name) => make("option", "", name)));
    if (!names.includes(current.model)) current.model = names[0];
    $("model").value = current.model;
    fail("");
  } catch (error) {
    if (error.status === 401) askForKey(loadModels);
    else fail(error.message, loadModels);
  }
}

function askForKey(then) {
  fail("The server asks for a key.", () => askForKey(then));
  retried = then;
  $("key").value = "";
  if (!$("door").open) $("door").showModal();
}

function useKey() {
  key = $("key").value.trim();
  sessionStorage.setItem("rwkv.key", key);
  const again = retried;
  fail("");
  again();
  if (again !== loadModels) loadModels();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  return (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
}

function colour(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  $("theme").ariaPressed = isDark();
}

const narrow = matchMedia("(max-width: 760px)");
function showSide(shown) {
  document.body.classList.toggle("side", shown);
  $("side").inert = narrow.matches && !shown;
  $("menu").ariaExpanded = shown;
}

// --- What people do ---

function onAct(event) {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  const { act, at } = button.dataset;
  const item = button.closest("li[data-id]");
  const talk = item && kept.conversations.get(item.dataset.id);
  if (act === "copy") copy(current.messages[at].content, button);
  else if (act === "copy-code") copy(button.closest(".code").querySelector("code").textContent, button);
  else if (act === "edit") editTurn(Number(at));
  else if (act === "retry") retry();
  else if (act === "rename") rename(talk, item);
  else if (act === "delete") remove(talk);
  else if (act === "open") open(talk), showSide(false), $("draft").focus();
}

function onKey(event) {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("side")) showSide(false), $("menu").focus();
    else if (running.has(current.id)) stop();
    else if (current.editing !== null) leaveEditing();
  } else if (event.key === "Enter" && !event.shiftKey && event.target === $("draft")) {
    event.preventDefault();
    send();
  }
}

function begin() {
  colour(kept.recall("rwkv.theme"));
  $("where").textContent = location.host;
  kept.load((id) => {
    const there = kept.conversations.get(id);
    if (there && id === current.id && !running.has(id)) open(Object.assign(there, { draft: current.draft }));
    else drawList();
  });
  const last = kept.conversations.get(kept.recall("rwkv.open"));
  if (last) open(last);
  else openNew();
  loadModels();
  showSide(false);

  document.addEventListener("click", onAct);
  document.addEventListener("keydown", onKey);
  dark.addEventListener("change", () => colour());
  narrow.addEventListener("change", () => showSide(false));
  new ResizeObserver(grow).observe($("composer"));
  addEventListener("pagehide", () => {
    for (const controller of running.values()) controller.abort("The page was closed here.");
    [current, ...unkept.keys()].forEach(keep);
  });
  const on = (id, event, done) => $(id).addEventListener(event, done);
  on("composer", "submit", (event) => (event.preventDefault(), send()));
  on("draft", "input", () => ((current.draft = $("draft").value), grow(), keepSoon(current)));
  on("stop", "click", () => (stop(), $("draft").focus()));
  on("undo", "click", takeBack);
  on("cancel", "click", leaveEditing);
  on("again", "click", () => retried());
  on("new", "click", openNew);
  on("menu", "click", () => (showSide(true), $("new").focus()));
  on("shade", "click", () => showSide(false));
  on("export", "click", download);
  on("import", "click", () => $("file").click());
  on("file", "change", upload);
  on("model", "change", () => ((current.model = $("model").value), keepSoon(current)));
  on("theme", "click", () => (colour(isDark() ? "light" : "dark"), kept.remember("rwkv.theme", isDark() ? "dark" : "light")));
  on("tune", "click", () => $("settings").showModal());
  on("settings", "input", takeSettings);
  on("reset", "click", () => (fields().forEach((field) => (field.value = "")), takeSettings()));
  on("door", "submit", useKey);
  on("no-key", "click", () => $("door").close());
  $("toast").lastElementChild.addEventListener("click", () => {
    const talk = deleted;
    deleted = null;
    $("toast").hidden = true;
    keep(talk);
    open(talk);
  });
}

begin();
