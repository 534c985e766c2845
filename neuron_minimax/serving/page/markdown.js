// Blocks of Markdown as elements: headings, lists, quotes, tables, rules, code. All is text nodes and createElement, so
// no text becomes HTML. While an answer streams in, only its last block is made anew.

import { appendInline, element } from "./inline.js";

const DEPTH = 6;  // of lists and quotes within each other; what is deeper is text

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*)|)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^([ \t]*)([-*+]|(\d{1,9})[.)])(?:[ \t]+(.*)|)$/;
const DELIMITER = /^:?-+:?$/;

/** Text as it grows: `append` takes a piece, `paint` shows what has come. */
export class Markdown {
  #parent;
  #rest = "";  // from the first block on that may still change
  #open = [];  // the blocks made of it
  #last = null;  // the block before them

  constructor(parent) {
    this.#parent = parent;
  }

  append(piece) {
    this.#rest += piece;
  }

  paint() {
    const lines = this.#rest.split(/\r?\n/);
    const blocks = blocksOf(lines, 0);
    let kept = 0;
    while (this.#open[kept] && blocks[kept] && goesOn(this.#open[kept], blocks[kept])) kept += 1;
    for (const { node } of this.#open.slice(kept)) removeBlock(node);
    this.#open = [];
    // Final is what two whole lines of another block follow: these say that it is another one.
    const final = blocks.findIndex((_, place) => !blocks[place + 1] || blocks[place + 1].start + 2 >= lines.length);
    blocks.forEach((block, place) => {
      if (place >= kept) block.node = placeBlock(this.#parent, block, place ? blocks[place - 1] : this.#last, 0);
      if (place >= final) this.#open.push(block);
    });
    if (final > 0) {
      this.#last = blocks[final - 1];
      this.#rest = lines.slice(blocks[final].start).join("\n");
    }
  }
}

/** Whether a block is as it was shown, or the same code gone on: it keeps its element, button and selection. */
function goesOn(shown, block) {
  const isSameCode = shown.isFence && block.isFence && shown.info === block.info;
  if (shown.source !== block.source && !isSameCode) return false;
  block.node = shown.node;
  block.code = shown.code;
  if (!isSameCode) return true;
  const text = block.code.firstChild;
  if (block.text.startsWith(text.data)) text.appendData(block.text.slice(text.length));
  else text.data = block.text;
  return true;
}

function removeBlock(node) {
  const list = node.parentNode;
  node.remove();
  if (node.tagName === "LI" && !list.firstChild) list.remove();
}

/** The blocks of some lines, each with its `source`, its first line `start` and the first after it, `end`. */
function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const block = blockAt(lines, at, depth);
    block.start = at;
    block.source = lines.slice(at, block.end).join("\n");
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenceAt(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return { level: heading[1].length, text: withoutClosing(heading[2] ?? ""), end: at + 1 };
  if (RULE.test(line)) return { isRule: true, end: at + 1 };
  if (depth < DEPTH && QUOTE.test(line)) return quoteAt(lines, at);
  const item = depth < DEPTH && ITEM.exec(line);
  if (item) return itemAt(lines, at, item);
  if (startsTable(lines, at)) return tableAt(lines, at);
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) end += 1;
  return { text: lines.slice(at, end).join("\n"), end };
}

/** Whether a line begins another block than the paragraph above it. */
function interrupts(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = ITEM.exec(line);
  if (item) return Boolean(item[4]) && (item[3] === undefined || Number(item[3]) === 1);
  return startsTable(lines, at);
}

function withoutClosing(title) {
  return title.trimEnd().replace(/(^|[ \t])#+$/, "").trimEnd();
}

function fenceAt(lines, at, [, indent, marks, info]) {
  const body = [];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end].trim();
    if (line.length >= marks.length && line === marks[0].repeat(line.length)) {
      end += 1;
      break;
    }
    body.push(dedented(lines[end], indent.length));
  }
  return { isFence: true, info: info.trim(), text: body.join("\n"), end };
}

function quoteAt(lines, at) {
  const body = [];
  let end = at;
  for (let found; end < lines.length && (found = QUOTE.exec(lines[end])); end += 1) body.push(found[1]);
  return { quoted: body, end };
}

function itemAt(lines, at, [, before, marker, number, first = ""]) {
  const indent = columnsOf(before);
  const body = [first];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (isBlank(line)) body.push("");
    else if (columnsOf(line) >= indent + 2) body.push(dedented(line, indent + marker.length + 1));
    else if (body.at(-1) && !ITEM.test(line) && !interrupts(lines, end)) body.push(line.trimStart());
    else break;
  }
  return { item: body, marker: marker.at(-1), number: Number(number), end };
}

function startsTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const delimiters = cellsOf(lines[at + 1]);
  return delimiters.length === cellsOf(lines[at]).length && delimiters.every((cell) => DELIMITER.test(cell));
}

function tableAt(lines, at) {
  const rows = [];
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) rows.push(cellsOf(lines[end++]));
  return { head: cellsOf(lines[at]), delimiters: cellsOf(lines[at + 1]), rows, end };
}

function cellsOf(line) {
  const cells = [""];
  for (const piece of line.trim().match(/\\\||[^|\\]+|[|\\]/g) ?? []) {
    if (piece === "|") cells.push("");
    else cells[cells.length - 1] += piece === "\\|" ? "|" : piece;
  }
  if (cells.length > 1 && !cells[0]) cells.shift();
  if (cells.length > 1 && !cells.at(-1)) cells.pop();
  return cells.map((cell) => cell.trim());
}

function isBlank(line) {
  return !line.trim();
}

function columnsOf(line) {
  let columns = 0;
  for (const character of line) {
    if (character !== " " && character !== "\t") break;
    columns += character === "\t" ? 4 : 1;
  }
  return columns;
}

function dedented(line, columns) {
  let at = 0;
  for (let left = columns; left > 0 && (line[at] === " " || line[at] === "\t"); at += 1) left -= line[at] === "\t" ? 4 : 1;
  return line.slice(at);
}

/** Add a block; an item goes into the list of the item before it. Returns its own element. */
function placeBlock(parent, block, previous, depth) {
  if (!block.item) {
    const node = buildBlock(block, depth);
    parent.append(node);
    return node;
  }
  let list = parent.lastElementChild;
  if (previous?.marker !== block.marker) {
    const isNumbered = block.number >= 0;
    list = element(parent, isNumbered ? "ol" : "ul");
    if (isNumbered) list.start = block.number;
  }
  const node = element(list, "li");
  placeAll(node, block.item, depth + 1);
  return node;
}

function placeAll(parent, lines, depth) {
  let previous = null;
  for (const block of blocksOf(lines, depth)) {
    placeBlock(parent, block, previous, depth);
    previous = block;
  }
}

function buildBlock(block, depth) {
  if (block.isFence) return buildCode(block);
  if (block.isRule) return element(null, "hr");
  if (block.head) return buildTable(block);
  if (block.quoted) {
    const quote = element(null, "blockquote");
    placeAll(quote, block.quoted, depth + 1);
    return quote;
  }
  // The page's own headings are the first two levels.
  const node = element(null, block.level ? `h${Math.min(6, block.level + 2)}` : "p");
  appendInline(node, block.text);
  return node;
}

function buildCode(block) {
  const box = element(null, "div", "code");
  const bar = element(box, "div", "bar");
  element(bar, "span", "language", block.info.split(/\s/)[0].slice(0, 40) || "text");
  const button = element(bar, "button", "copy", "Copy");
  button.type = "button";
  block.code = element(element(box, "pre"), "code");
  block.code.append(document.createTextNode(block.text));
  return box;
}

function buildTable({ head, delimiters, rows }) {
  const scroll = element(null, "div", "scroll");
  const table = element(scroll, "table");
  const aligned = delimiters.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const addRow = (parent, tag, cells) => {
    const row = element(parent, "tr");
    aligned.forEach((className, place) => appendInline(element(row, tag, className), cells[place] ?? ""));
  };
  addRow(element(table, "thead"), "th", head);
  const body = element(table, "tbody");
  for (const row of rows) addRow(body, "td", row);
  return scroll;
}
