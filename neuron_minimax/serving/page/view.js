// The view of one message: text, reasoning, tool calls, and what is known of their time. It is painted once a frame at most,
// however many pieces come.

import { element } from "./inline.js";
import { Markdown } from "./markdown.js";

export const NAMES = { user: "You", tool: "Tool result", assistant: "Assistant" };
const JSON_TOKEN = /"(?:[^"\\]|\\.)*"|\{\s*\}|\[\s*\]|[{}[\],:]|[^\s{}[\],:"]+/g;
const log = document.getElementById("log");
const waiting = new Set();  // views with something to paint
let follows = true;  // the log shows its end, until somebody scrolls up

log.addEventListener("scroll", () => { follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40; });
new ResizeObserver(follow).observe(log);

function follow() {
  if (follows) log.scrollTop = log.scrollHeight;
}

/** Show the end of the log, from now on too. */
export function toEnd() {
  follows = true;
  follow();
}

/** Copy a text; a page that is not served to its own machine, or over TLS, has no navigator.clipboard. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const focused = document.activeElement;
  const area = element(document.body, "textarea", "hidden");
  area.value = text;
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!isCopied) throw new Error("the browser does not allow it; select the text and copy it by hand");
}

/** JSON on several lines, each number as it was sent; what is no JSON stays as it is. */
export function indented(json) {
  try {
    JSON.parse(json);
  } catch {
    return json;
  }
  let depth = 0;
  const line = () => `\n${"  ".repeat(depth)}`;
  return json.match(JSON_TOKEN).map((token) => {
    if (token === ":") return ": ";
    if (token === ",") return `,${line()}`;
    if (token === "{" || token === "[") {
      depth += 1;
      return token + line();
    }
    if (token !== "}" && token !== "]") return token;
    depth -= 1;
    return line() + token;
  }).join("");
}

function paintAll() {
  for (const view of waiting) view.paint();
  waiting.clear();
  follow();
}

/** One message of the log. */
export class View {
  #text = null;
  #reasoning = null;
  #calls = [];
  #rate = null;

  constructor(role) {
    this.role = role;
    this.article = element(null, "article", role);
    element(this.article, "h2", "", NAMES[role]);
    this.body = element(this.article, "div");
    log.append(this.article);
    follow();
  }

  /** A whole message. */
  static of(message) {
    const view = new View(message.role);
    if (message.reasoning_content) view.reason(message.reasoning_content);
    if (message.content) view.say(message.content);
    (message.tool_calls ?? []).forEach((call, place) => view.call(place, call.function.name, call.function.arguments));
    view.end();
    return view;
  }

  /** A button below the message. */
  offer(name, className, act) {
    const actions = this.article.querySelector(".actions") ?? element(this.article, "div", "actions");
    const button = element(actions, "button", className, name);
    button.type = "button";
    button.addEventListener("click", act);
    follow();
  }

  reason(piece) {
    if (!this.#reasoning) {
      const fold = element(this.body, "details", "reasoning running");
      this.#reasoning = { summary: element(fold, "summary", "", "Reasoning"), fold, pending: "", text: textOf(element(fold, "pre")) };
    }
    this.#reasoning.pending += piece;
    this.#later();
  }

  say(piece) {
    if (!this.#text) {
      this.#reasoning?.fold.classList.remove("running");
      const place = element(this.body, "div", "text");
      this.#text = this.role === "assistant" ? new Markdown(place) : textOf(element(place, "pre"));
    }
    if (this.#text instanceof Markdown) this.#text.append(piece);
    else this.#text.appendData(piece);
    this.#later();
  }

  call(place, name, piece) {
    if (!this.#calls[place]) {
      this.#reasoning?.fold.classList.remove("running");
      const fold = element(this.body, "details", "call");
      fold.open = true;
      const summary = element(fold, "summary", "", "Calls ");
      element(summary, "code", "", name);
      this.#calls[place] = { pending: "", text: textOf(element(fold, "pre")) };
    }
    this.#calls[place].pending += piece;
    this.#later();
  }

  /** The one line on time and speed, and whether it goes on moving. */
  rate(words, isRunning = false) {
    this.#rate ??= element(this.article, "p", "rate");
    this.#rate.classList.toggle("running", isRunning);
    this.#rate.textContent = words;
    follow();
  }

  error(words) {
    element(this.body, "p", "error", words);
    follow();
  }

  /** Show what is left, arguments in their final form. */
  end() {
    this.#reasoning?.fold.classList.remove("running");
    this.paint();
    for (const { text } of this.#calls.filter(Boolean)) text.data = indented(text.data);
    follow();
  }

  paint() {
    for (const part of [this.#reasoning, ...this.#calls].filter(Boolean)) {
      if (part.pending) part.text.appendData(part.pending);
      part.pending = "";
    }
    if (this.#text instanceof Markdown) this.#text.paint();
  }

  #later() {
    if (!waiting.size) requestAnimationFrame(paintAll);
    waiting.add(this);
  }
}

function textOf(parent) {
  const text = document.createTextNode("");
  parent.append(text);
  return text;
}
