// A conversation as a file: Markdown to read, JSON to send again.

import { element } from "./inline.js";
import { NAMES, indented } from "./view.js";

/** Markdown; what is no prose stands in fences that nothing in it closes. */
export function asMarkdown(model, messages) {
  const titles = { ...NAMES, system: "System", assistant: model };
  const parts = [`# Conversation with ${model}`];
  for (const message of messages) {
    parts.push(`## ${titles[message.role]}`);
    if (message.reasoning_content) parts.push("Reasoning:", fenced("text", message.reasoning_content));
    if (message.content) parts.push(message.role === "tool" ? fenced("text", message.content) : message.content);
    for (const call of message.tool_calls ?? []) {
      parts.push(`Calls \`${call.function.name}\`:`, fenced("json", indented(call.function.arguments)));
    }
  }
  return `${parts.join("\n\n")}\n`;
}

function fenced(language, text) {
  const longest = (text.match(/`+/g) ?? []).reduce((most, run) => Math.max(most, run.length), 2);
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${text}\n${fence}`;
}

/** Hand a text to the browser as a file to keep. */
export function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = element(document.body, "a");
  link.href = address;
  link.download = name.replace(/[^\w.-]+/g, "-");
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
