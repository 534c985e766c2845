// A chat with this server: streams answers, folds the reasoning away, shows tool calls. No library, no other host.
"use strict";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "seed", "max_tokens"];
const KEPT_SETTINGS = [...NUMBERS, "system", "tools"];
let messages = [];
let model = null;
let abort = null;

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function element(parent, tag, className, text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  parent.append(made);
  return made;
}

function save() {
  sessionStorage.setItem("messages", JSON.stringify(messages));
  for (const id of KEPT_SETTINGS) sessionStorage.setItem(id, $(id).value);
}

/** The view of one message; returns functions that add to it. */
function view(role) {
  const article = element($("log"), "article", role);
  element(article, "h2", "", { user: "You", tool: "Tool result", assistant: "MiniMax-M2" }[role]);
  let reasoning = null;
  let text = null;
  const calls = [];
  const follow = (change) => {
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    change();
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  return {
    reason: (piece) => follow(() => {
      if (!reasoning) {
        const fold = element(article, "details", "reasoning");
        element(fold, "summary", "", "Reasoning");
        reasoning = element(fold, "pre", "");
      }
      reasoning.append(piece);
    }),
    say: (piece) => follow(() => {
      text ??= element(article, "div", "text");
      text.append(piece);
    }),
    call: (index, name, piece) => follow(() => {
      if (!calls[index]) {
        const fold = element(article, "details", "call");
        fold.open = true;
        element(fold, "summary", "", `Calls ${name}`);
        calls[index] = element(fold, "pre", "");
      }
      calls[index].append(piece);
    }),
    note: (className, words) => follow(() => element(article, "div", className, words)),
  };
}

function show(message) {
  const shown = view(message.role);
  if (message.reasoning_content) shown.reason(message.reasoning_content);
  if (message.content) shown.say(message.content);
  (message.tool_calls ?? []).forEach((call, index) => shown.call(index, call.function.name, call.function.arguments));
}

function request() {
  const body = { model, messages: [...messages], stream: true, stream_options: { include_usage: true } };
  const system = $("system").value.trim();
  if (system) body.messages.unshift({ role: "system", content: system });
  for (const id of NUMBERS) if ($(id).value !== "") body[id] = Number($(id).value);
  const tools = $("tools").value.trim();
  if (tools) body.tools = JSON.parse(tools);
  return body;
}

/** Yields the objects of a server-sent event stream. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function add(message, shown, delta) {
  if (delta.reasoning_content) {
    message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
    shown.reason(delta.reasoning_content);
  }
  if (delta.content) {
    message.content += delta.content;
    shown.say(delta.content);
  }
  for (const piece of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[piece.index] ??= { id: piece.id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += piece.function.name ?? "";
    call.function.arguments += piece.function.arguments ?? "";
    shown.call(piece.index, call.function.name, piece.function.arguments ?? "");
  }
}

async function stream(message, shown) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(request()), signal: abort.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let first = 0;
  let chunks = 0;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.choices.length) {
      const { delta, finish_reason: reason } = event.choices[0];
      if (delta.content || delta.reasoning_content || delta.tool_calls) {
        first ||= performance.now();
        chunks += 1;
      }
      add(message, shown, delta);
      const seconds = (performance.now() - first) / 1000;
      if (chunks > 1) $("status").value = `${((chunks - 1) / seconds).toFixed(1)} tokens/s`;
      if (reason === "length") shown.note("rate", "Cut off: the limit of tokens was reached.");
      message.cut = reason === "length";
    }
    if (event.usage && first) {
      const seconds = (performance.now() - first) / 1000;
      const rate = seconds > 0 ? (event.usage.completion_tokens - 1) / seconds : 0;
      shown.note("rate", `${event.usage.completion_tokens} tokens, ${rate.toFixed(1)} tokens/s`);
    }
  }
}

/** Ask for the next turn; a message with tool calls waits for their results, typed by the user. */
async function answer() {
  const conversation = messages;
  const message = { role: "assistant", content: "" };
  const shown = view("assistant");
  abort = new AbortController();
  busy(true);
  try {
    await stream(message, shown);
    $("status").value = message.tool_calls ? "Type the tool's result and send it." : "";
  } catch (error) {
    if (error.name === "AbortError") shown.note("rate", "Stopped.");
    else shown.note("error", `Error: ${error.message}`);
    message.cut = true;
    $("status").value = "";
  }
  if (conversation !== messages) return;  // a new chat was begun meanwhile
  if (message.cut) delete message.tool_calls;  // an unfinished call cannot be answered
  delete message.cut;
  if (message.content || message.reasoning_content || message.tool_calls) messages.push(message);
  save();
  busy(false);
}

function busy(now) {
  $("send").hidden = now;
  $("stop").hidden = !now;
  $("log").setAttribute("aria-busy", String(now));
  (now ? $("stop") : $("text")).focus();
}

function unanswered() {
  const last = messages.findLastIndex((message) => message.role === "assistant");
  const calls = messages[last]?.tool_calls ?? [];
  return calls[messages.length - 1 - last];
}

function send() {
  const content = $("text").value.trim();
  if (!content || !$("stop").hidden) return;
  $("text").value = "";
  const call = unanswered();
  messages.push(call ? { role: "tool", tool_call_id: call.id, content } : { role: "user", content });
  show(messages.at(-1));
  save();
  if (call && unanswered()) $("status").value = `Type the result of ${unanswered().function.name} and send it.`;
  else answer();
}

async function findModel() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    const body = await response.json();
    if (!response.ok) throw new Error(body.error.message);
    model = body.data[0].id;
    $("model").textContent = model;
    $("status").value = "";
  } catch (error) {
    $("model").textContent = "MiniMax-M2";
    $("status").value = error.message;
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("stop").addEventListener("click", () => abort?.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape") abort?.abort(); });
$("new").addEventListener("click", () => {
  abort?.abort();
  messages = [];
  $("log").replaceChildren();
  $("status").value = "";
  save();
  busy(false);
});
$("key").addEventListener("change", findModel);

for (const id of KEPT_SETTINGS) $(id).value = sessionStorage.getItem(id) ?? "";
messages = JSON.parse(sessionStorage.getItem("messages") ?? "[]");
messages.forEach(show);
findModel();
