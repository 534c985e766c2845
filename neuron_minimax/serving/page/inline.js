// Markdown within a line as elements: code, emphasis, links to other pages; formulas and HTML stay text.

const WAITING = 16;  // beginnings of emphasis that may still find their end
const SCHEMES = ["http:", "https:", "mailto:"];

const SPECIAL = /\\|`+|\*+|_+|~~|\$\$|!?\[|<|https?:\/\//g;
const LINK = /!?\[((?:[^[\]\\]|\\.)*)\]\([ \t]*(?:<([^<>\n]*)>|([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*))(?:[ \t]+"[^"\n]*")?[ \t]*\)/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^<>\s]*)>/y;
const ADDRESS = /https?:\/\/[^\s<>`"]*/y;
const ESCAPED = /[!"#$%&'*+,\-./:;<=>?@\\^_`{|}~]/;
const WORD = /[\p{L}\p{N}]/u;
const SPACE = /\s/;

export function element(parent, tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  parent?.append(made);
  return made;
}

/** Add a paragraph, heading, cell or label (in which there are no links). */
export function appendInline(parent, text, isLabel = false) {
  for (const node of new Inline(text, isLabel).nodes()) parent.append(node);
}

/** The nodes of such a text. */
class Inline {
  #text;
  #isLabel;
  #made = [];  // nodes, and {mark, count} for what may begin emphasis
  #waiting = [];  // places of the latter
  #missing = new Set();  // ends that the rest of the text does not have

  constructor(text, isLabel) {
    this.#text = text;
    this.#isLabel = isLabel;
  }

  nodes() {
    const text = this.#text;
    const special = new RegExp(SPECIAL);
    let taken = 0;
    for (let found; (found = special.exec(text));) {
      const at = found.index;
      const next = this.#read(found[0], at, (nodes) => {
        if (at > taken) this.#made.push(document.createTextNode(text.slice(taken, at)));
        this.#made.push(...nodes);
      });
      if (next > at) {
        taken = next;
        special.lastIndex = next;
      }
    }
    if (taken < text.length) this.#made.push(document.createTextNode(text.slice(taken)));
    return this.#made.map(asNode);
  }

  /** Where the text goes on behind what begins at `at`, or 0 when it is only text. */
  #read(mark, at, take) {
    if (mark[0] === "`") return this.#readCode(mark, at, take);
    if (mark[0] === "*" || mark[0] === "_" || mark === "~~") return this.#readEmphasis(mark, at, take);
    if (mark === "\\") return this.#readEscape(at, take);
    if (mark === "$$") return this.#readFormula("$$", at, take);
    return this.#isLabel ? 0 : this.#readLink(mark, at, take);
  }

  #readCode(mark, at, take) {
    const start = at + mark.length;
    const end = this.#find(mark, start);
    if (end < 0) {
      take([mark]);
      return start;
    }
    const code = this.#text.slice(start, end).replaceAll("\n", " ");
    const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
    take([element(null, "code", "", isPadded ? code.slice(1, -1) : code)]);
    return end + mark.length;
  }

  #readEscape(at, take) {
    const next = this.#text[at + 1] ?? "";
    if (next === "(") return this.#readFormula("\\)", at, take);
    if (next === "[") return this.#readFormula("\\]", at, take);
    if (!ESCAPED.test(next)) return 0;
    take([next]);
    return at + 2;
  }

  #readFormula(closing, at, take) {
    const end = this.#find(closing, at + 2);
    if (end < 0) return 0;
    take([this.#text.slice(at, end + 2)]);
    return end + 2;
  }

  /** Where `closing` is from here on; a run of backticks counts only as a whole. */
  #find(closing, from) {
    if (this.#missing.has(closing)) return -1;
    const text = this.#text;
    let at = text.indexOf(closing, from);
    while (closing[0] === "`" && at >= 0) {
      let end = at;
      while (text[end] === "`") end += 1;
      if (end - at === closing.length) break;
      at = text.indexOf(closing, end);
    }
    if (at < 0) this.#missing.add(closing);
    return at;
  }

  #readLink(mark, at, take) {
    const pattern = { "<": AUTOLINK, h: ADDRESS }[mark[0]] ?? LINK;
    pattern.lastIndex = at;
    const found = pattern.exec(this.#text);
    if (!found) return 0;
    const target = mark[0] === "h" ? withoutPunctuation(found[0]) : (found[2] ?? found[3] ?? found[1]);
    const link = linkTo(pattern === LINK ? (found[2] ?? found[3]) : target);
    if (!link) return 0;
    if (pattern !== LINK) link.textContent = target;
    else if (mark[0] === "!") link.textContent = `Image: ${found[1] || link.href}`;  // nothing is fetched from elsewhere
    else appendInline(link, found[1] || link.href, true);
    take([link]);
    return at + (mark[0] === "h" ? target.length : found[0].length);
  }

  #readEmphasis(run, at, take) {
    const mark = run[0];
    const end = at + run.length;
    const before = this.#text[at - 1] ?? " ";
    const after = this.#text[end] ?? " ";
    const opens = !SPACE.test(after) && (mark !== "_" || !WORD.test(before));
    const closes = !SPACE.test(before) && (mark !== "_" || !WORD.test(after));
    take([]);
    let count = run.length;
    if (count <= 3 && closes) count = this.#close(mark, count);
    if (!count) return end;
    if (opens && count <= 3) {
      this.#waiting.push(this.#made.length);
      if (this.#waiting.length > WAITING) this.#waiting.shift();
    }
    this.#made.push({ mark, count });
    return end;
  }

  /** Close what `count` marks end; returns how many of them are left. */
  #close(mark, count) {
    let left = count;
    while (left) {
      const place = this.#waiting.findLastIndex((each) => this.#made[each].mark === mark);
      if (place < 0) break;
      const at = this.#waiting[place];
      const opening = this.#made[at];
      const used = Math.min(2, left, opening.count);
      const tag = mark === "~" ? "del" : ["em", "strong"][used - 1];
      const emphasis = element(null, tag);
      for (const node of this.#made.splice(at + 1)) emphasis.append(asNode(node));
      this.#waiting.length = place + 1;
      opening.count -= used;
      left -= used;
      if (!opening.count) {
        this.#made.pop();
        this.#waiting.pop();
      }
      this.#made.push(emphasis);
    }
    return left;
  }
}

function asNode(made) {
  return made.mark ? document.createTextNode(made.mark.repeat(made.count)) : made;
}

function withoutPunctuation(address) {
  const trailing = address.includes("(") ? ".,;:!?'*_~]}" : ".,;:!?'*_~]})";
  let end = address.length;
  while (trailing.includes(address[end - 1])) end -= 1;
  return address.slice(0, end);
}

function linkTo(target) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (!SCHEMES.includes(url.protocol)) return null;
  const link = element(null, "a");
  link.href = url.href;
  link.title = url.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}
