// Markdown as DOM nodes. Text only ever becomes a text node, so no HTML of a message is run.
//
// A model that repeats itself writes thousands of brackets, backticks or quotation marks in a line,
// and all is drawn again as it grows. Therefore patterns take time in proportion to the text, and
// quotations and lists within each other end at DEEPEST, below which they are text.

const DEEPEST = 12;

const BLOCKS = [
  [/^ {0,3}(`{3,}|~{3,})\s*(\S*)/, fence],
  [/^ {0,3}(#{1,6})\s+/, heading],
  [/^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/, rule],
  [/^ {0,3}>/, quote],
  [/^ {0,3}(?:[-*+]|\d{1,9}[.)])\s+/, list],
];
const NESTED = new Set([quote, list]);

export function render(text) {
  return blocks(text.split(/\r\n?|\n/), 0);
}

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function blocks(lines, depth) {
  const out = document.createDocumentFragment();
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) { at += 1; continue; }
    const found = BLOCKS.find(([pattern]) => pattern.test(lines[at]));
    const [node, next] = found && (depth < DEEPEST || !NESTED.has(found[1])) ? found[1](lines, at, depth) : isTable(lines, at) ? table(lines, at) : paragraph(lines, at);
    out.append(node);
    at = next;
  }
  return out;
}

function fence(lines, at) {
  const mark = lines[at].match(BLOCKS[0][0])[1];
  const body = [];
  let next = at + 1;
  for (; next < lines.length; next += 1) {
    const line = lines[next].trim();
    if (line.startsWith(mark) && line.replaceAll(mark[0], "") === "") break;
    body.push(lines[next]);
  }
  return [element("pre", element("code", body.join("\n"))), next + 1];
}

function heading(lines, at) {
  const [whole, marks] = lines[at].match(BLOCKS[1][0]);
  return [element(`h${Math.min(6, marks.length + 1)}`, inline(lines[at].slice(whole.length))), at + 1];
}

function rule(lines, at) {
  return [element("hr"), at + 1];
}

function quote(lines, at, depth) {
  let next = at;
  const body = [];
  while (next < lines.length && BLOCKS[3][0].test(lines[next])) {
    body.push(lines[next].replace(/^ {0,3}> ?/, ""));
    next += 1;
  }
  return [element("blockquote", blocks(body, depth + 1)), next];
}

function list(lines, at, depth) {
  const ordered = /^ {0,3}\d/.test(lines[at]);
  const node = element(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(lines[at], 10);
  let next = at;
  while (next < lines.length) {
    const found = lines[next].match(/^( {0,3}(?:[-*+]|\d{1,9}[.)])\s+)(.*)$/s);
    if (!found || /^ {0,3}\d/.test(lines[next]) !== ordered) break;
    const body = [found[2]];
    const indent = Math.min(found[1].length, 4);
    next += 1;
    while (next < lines.length && (lines[next].startsWith(" ".repeat(Math.min(indent, 2))) || (!lines[next].trim() && lines[next + 1]?.startsWith("  ")))) {
      body.push(lines[next].slice(Math.min(indent, lines[next].length - lines[next].trimStart().length)));
      next += 1;
    }
    node.append(element("li", ...(body.length > 1 ? [blocks(body, depth + 1)] : [inline(body[0])])));
    if (next < lines.length && !lines[next].trim() && BLOCKS[4][0].test(lines[next + 1] ?? "")) next += 1;
  }
  return [node, next];
}

function isTable(lines, at) {
  return lines[at].includes("|") && /^(?:\|\s*)?:?-+:?(?:\s*\|\s*:?-+:?)*(?:\s*\|)?$/.test((lines[at + 1] ?? "").trim());
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function table(lines, at) {
  const row = (line, name) => element("tr", ...cells(line).map((cell) => element(name, inline(cell))));
  const node = element("table", element("thead", row(lines[at], "th")));
  const body = element("tbody");
  let next = at + 2;
  while (next < lines.length && lines[next].includes("|")) {
    body.append(row(lines[next], "td"));
    next += 1;
  }
  node.append(body);
  return [node, next];
}

function paragraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && !BLOCKS.some(([pattern]) => pattern.test(lines[next]))) next += 1;
  const node = element("p");
  lines.slice(at, next).forEach((line, number) => {
    if (number) node.append(element("br"));
    node.append(inline(line));
  });
  return [node, next];
}

const SPANS = /(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)|\*\*(.+?)\*\*|__(.+?)__|\*([^\s*][^*]*)\*|\[([^[\]]+)\]\((https?:\/\/[^\s)]+)\)/gs;

function inline(text) {
  const out = document.createDocumentFragment();
  let done = 0;
  for (const found of text.matchAll(SPANS)) {
    out.append(text.slice(done, found.index));
    const [whole, , code, strong, strong2, weak, label, address] = found;
    if (code !== undefined) out.append(element("code", code));
    else if (strong ?? strong2) out.append(element("strong", inline(strong ?? strong2)));
    else if (weak) out.append(element("em", inline(weak)));
    else {
      const link = element("a", inline(label));
      link.href = address;
      link.rel = "noopener noreferrer";
      link.target = "_blank";
      out.append(link);
    }
    done = found.index + whole.length;
  }
  out.append(text.slice(done));
  return out;
}
