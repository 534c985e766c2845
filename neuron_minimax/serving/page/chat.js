// A chat with this server: streams answers, folds the reasoning away, shows tool calls. No library, no other host.

import { Clock } from "./clock.js";
import { asMarkdown, download } from "./export.js";
import { View, copy, toEnd } from "./view.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "seed", "max_tokens"];
const KEPT_SETTINGS = [...NUMBERS, "thinking", "system", "tools"];
const NEXT_LOOK = 2000;  // milliseconds until a server that loads its model is asked again
let messages = [];
let views = new Map();  // by message
let model = null;
let abort = null;
let edited = null;  // the message that the next one replaces, with what follows it
let notRestored = "";  // is said once the model is there, whose absence is said first

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function save() {
  try {
    sessionStorage.setItem("messages", JSON.stringify(messages));
    for (const id of KEPT_SETTINGS) sessionStorage.setItem(id, $(id).value);
  } catch {
    $("status").value = "The browser does not keep this conversation (it is too long, or storage is off): a reload loses it. Export it.";
  }
}

function restore() {
  try {
    for (const id of KEPT_SETTINGS) $(id).value = sessionStorage.getItem(id) ?? "";
    messages = JSON.parse(sessionStorage.getItem("messages") ?? "[]");
    for (const message of messages) show(message);
  } catch {
    messages = [];
    views = new Map();
    $("log").replaceChildren();
    notRestored = "What the browser kept of a conversation cannot be read: this is a new one.";
  }
}

function show(message) {
  const view = View.of(message);
  views.set(message, view);
  if (message.role === "user") view.offer("Edit", "edit", () => edit(message));
  if (message.role === "assistant") offerMore(view, message);
}

function offerMore(view, message) {
  if (message.content) view.offer("Copy", "copy", () => copied(message.content));
  view.offer("Regenerate", "again", regenerate);
}

async function copied(text) {
  try {
    await copy(text);
    $("status").value = "Copied.";
  } catch (error) {
    $("status").value = `Not copied: ${error.message}`;
  }
}

function conversation() {
  const system = $("system").value.trim();
  return system ? [{ role: "system", content: system }, ...messages] : [...messages];
}

/** The request for the next answer, which is also what an export as JSON holds. */
function request() {
  const body = { model, messages: conversation() };
  for (const id of NUMBERS) if ($(id).value !== "") body[id] = Number($(id).value);
  const thinking = $("thinking").value;
  if (thinking) body.chat_template_kwargs = { enable_thinking: thinking === "on" };
  const tools = $("tools").value.trim();
  try {
    if (tools) body.tools = JSON.parse(tools);
  } catch (error) {
    throw new Error(`the tools in the settings are no JSON: ${error.message}`);
  }
  return body;
}

/** Fetch from this server; throws an Error with its message when it refuses, and with its status. */
async function ask(path, options = {}) {
  const response = await fetch(path, { headers: headers(), ...options });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const words = body?.error?.message ?? `${path}: the server answered ${response.status} ${response.statusText}`;
  throw Object.assign(new Error(words), { status: response.status });
}

/** Yields the objects of a server-sent event stream. Throws when it ends before its own end. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function add(message, view, delta) {
  if (delta.reasoning_content) {
    message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
    view.reason(delta.reasoning_content);
  }
  if (delta.content) {
    message.content += delta.content;
    view.say(delta.content);
  }
  for (const piece of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[piece.index] ??= { id: piece.id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += piece.function.name ?? "";
    call.function.arguments += piece.function.arguments ?? "";
    view.call(piece.index, call.function.name, piece.function.arguments ?? "");
  }
}

/** Stream the answer into `message` and its view. Returns the number of tokens and why it ended. */
async function stream(message, view, clock) {
  const body = JSON.stringify({ ...request(), stream: true, stream_options: { include_usage: true } });
  const response = await ask("/v1/chat/completions", { method: "POST", body, signal: abort.signal });
  const ended = { tokens: 0, reason: null };
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.choices.length) {
      const { delta, finish_reason: reason } = event.choices[0];
      if (delta.content || delta.reasoning_content || delta.tool_calls) clock.piece();
      add(message, view, delta);
      ended.reason = reason ?? ended.reason;
    }
    if (event.usage) ended.tokens = event.usage.completion_tokens;
  }
  return ended;
}

/** Ask for the next turn; a message with tool calls waits for their results, typed by the user. */
async function answer() {
  const asked = messages;
  const message = { role: "assistant", content: "" };
  const view = new View("assistant");
  const clock = new Clock(view);
  abort = new AbortController();
  busy(true);
  toEnd();
  let isWhole = false;
  let status = "";
  try {
    const { tokens, reason } = await stream(message, view, clock);
    isWhole = reason !== "length";
    clock.end(isWhole ? "" : "Cut off: the limit of tokens was reached.", tokens);
    status = message.tool_calls && isWhole ? resultOf(message.tool_calls[0]) : "";
  } catch (error) {
    if (error.name === "AbortError") clock.end("Stopped.");
    else clock.end("Not finished.");
    if (error.name !== "AbortError") view.error(`Error: ${error.message}`);
  }
  view.end();
  if (asked !== messages) return;  // a new chat was begun meanwhile
  if (!isWhole) delete message.tool_calls;  // an unfinished call cannot be answered
  if (message.content || message.reasoning_content || message.tool_calls) messages.push(message);
  offerMore(view, message);
  $("status").value = status;
  save();
  busy(false);
}

/** Show the one button of sending and stopping that does something; the focus goes with it. */
function busy(now) {
  const [shown, left] = now ? [$("stop"), $("send")] : [$("send"), $("stop")];
  const hadFocus = document.activeElement === left;
  shown.hidden = false;
  left.hidden = true;
  $("log").setAttribute("aria-busy", String(now));
  if (hadFocus) (now ? shown : $("text")).focus();
}

function isBusy() {
  return $("send").hidden;
}

function unanswered() {
  const last = messages.findLastIndex((message) => message.role === "assistant");
  const calls = messages[last]?.tool_calls ?? [];
  return calls[messages.length - 1 - last];
}

function resultOf(call) {
  return `Type the result of ${call.function.name} and send it.`;
}

function send(content) {
  if (!content || isBusy()) return;
  if (edited) forgetFrom(edited);
  endEdit();
  const call = unanswered();
  messages.push(call ? { role: "tool", tool_call_id: call.id, content } : { role: "user", content });
  show(messages.at(-1));
  toEnd();
  save();
  if (call && unanswered()) $("status").value = resultOf(unanswered());
  else answer();
}

function forgetFrom(message) {
  const { article } = views.get(message);
  while (article.nextSibling) article.nextSibling.remove();
  article.remove();
  messages.length = messages.indexOf(message);
}

/** Ask again for the last answer, which may have failed. */
function regenerate() {
  if (isBusy()) return;
  endEdit();
  while ($("log").lastElementChild.classList.contains("assistant")) $("log").lastElementChild.remove();
  while (messages.at(-1)?.role === "assistant") messages.pop();
  $("text").focus();
  answer();
}

function edit(message) {
  if (isBusy()) return;
  endEdit();
  edited = message;
  views.get(message).article.classList.add("edited");
  $("text").value = message.content;
  $("text").focus();
  $("status").value = "Sending replaces the message and what follows it; Escape leaves it as it is.";
}

function endEdit() {
  if (!edited) return;
  views.get(edited).article.classList.remove("edited");
  edited = null;
  $("text").value = "";
  $("status").value = "";
}

function exportAs(form) {
  $("export").open = false;
  const name = `${model ?? "chat"}-${new Date().toISOString().slice(0, 19)}`;
  try {
    if (form === "json") download(`${name}.json`, "application/json", `${JSON.stringify(request(), null, 2)}\n`);
    else download(`${name}.md`, "text/markdown", asMarkdown(model ?? "Assistant", conversation()));
  } catch (error) {
    $("status").value = `Not exported: ${error.message}`;
  }
}

async function findModel() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    model = data[0].id;
    $("model").textContent = model;
    document.title = model;
    $("status").value = notRestored;
    notRestored = "";
  } catch (error) {
    $("model").textContent = "No model";
    $("status").value = error.message;
    if (error.status === 503) setTimeout(findModel, NEXT_LOOK);
    if (error.status === 401) {
      $("settings").open = true;
      $("key").focus();
    }
  }
}

function startAgain() {
  abort?.abort();
  endEdit();
  messages = [];
  views = new Map();
  $("log").replaceChildren();
  $("status").value = "";
  save();
  busy(false);
  $("text").focus();
}

function sendText() {
  if (isBusy()) return;
  const content = $("text").value.trim();
  send(content);
  if (content) $("text").value = "";
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); sendText(); });
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); sendText(); }
});
$("stop").addEventListener("click", () => abort?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (isBusy()) abort.abort();
  else if (edited) endEdit();
  else if ($("export").open) $("export").open = false;
});
$("new").addEventListener("click", startAgain);
$("as-markdown").addEventListener("click", () => exportAs("markdown"));
$("as-json").addEventListener("click", () => exportAs("json"));
$("welcome").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  send(event.target.textContent);
  $("text").focus();
});
$("log").addEventListener("click", (event) => {
  if (event.target.matches(".code > .bar > .copy")) copied(event.target.closest(".code").querySelector("pre").textContent);
});
$("settings").addEventListener("change", save);
$("key").addEventListener("change", findModel);

restore();
findModel();
