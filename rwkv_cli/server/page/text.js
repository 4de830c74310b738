// The model's text as elements. Everything it says becomes text nodes, so that no text can be more than text.

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)/;
const INLINE =
  /`([^`\n]+)`|\*\*(?=\S)([^\n]{1,1000}?)(?<=\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]{1,1000}?)(?<=\S)\*(?![\w*])/g;

// Make an element with a class and children, which are nodes or texts.
export function make(tag, name = "", ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

// Show a text in an element. Blocks that have not changed keep their elements, and with them what a reader selected.
export function show(element, text) {
  const wanted = blocks(text);
  wanted.forEach((block, at) => {
    const source = `${block.kind}\n${block.lines.join("\n")}`;
    const there = element.children[at];
    if (there?.source === source) return;
    const drawn = DRAW[block.kind](block.lines);
    drawn.source = source;
    if (there) there.replaceWith(drawn);
    else element.append(drawn);
  });
  while (element.children.length > wanted.length) element.lastElementChild.remove();
}

// Split a text into blocks: code, headings, lists and paragraphs, each with its lines.
function blocks(text) {
  const found = [];
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at];
    const last = found.at(-1);
    const fence = FENCE.exec(line);
    if (fence) {
      const code = [fence[2]];
      while (++at < lines.length && !(lines[at].trim().startsWith(fence[1]) && !/[^`~\s]/.test(lines[at]))) code.push(lines[at]);
      found.push({ kind: "code", lines: code });
    } else if (!line.trim()) {
      if (last) last.ended = true;
    } else if (HEADING.test(line)) {
      found.push({ kind: "heading", lines: [line], ended: true });
    } else if (ITEM.test(line) || (last?.kind === "list" && (!last.ended || /^\s/.test(line)))) {
      if (last?.kind === "list") last.lines.push(line);
      else found.push({ kind: "list", lines: [line] });
    } else if (last?.kind === "paragraph" && !last.ended) {
      last.lines.push(line);
    } else {
      found.push({ kind: "paragraph", lines: [line] });
    }
  }
  return found;
}

const DRAW = {
  paragraph: (lines) => make("p", "", ...inline(lines.join("\n"))),
  heading: ([line]) => {
    const [, level, text] = HEADING.exec(line);
    return make(`h${Math.min(6, level.length + 2)}`, "", ...inline(text));
  },
  code: ([language, ...lines]) => {
    const copy = make("button", "quiet", "Copy");
    copy.type = "button";
    copy.dataset.act = "copy-code";
    const pre = make("pre", "", make("code", "", lines.join("\n")));
    pre.tabIndex = 0;
    return make("div", "code", make("div", "", make("span", "", language || "text"), copy), pre);
  },
  list: (lines) => {
    const root = make("div", "list");
    const open = []; // the lists that a line stands in, the outer ones first: {indent, list}
    for (const line of lines) {
      const found = ITEM.exec(line);
      if (!found) {
        open.at(-1).list.lastElementChild.append("\n", ...inline(line.trim()));
        continue;
      }
      const [, { length: indent }, mark, text] = found;
      const tag = /\d/.test(mark) ? "OL" : "UL";
      while (open.length && indent < open.at(-1).indent) open.pop();
      if (open.length && indent < open.at(-1).indent + 2 && open.at(-1).list.tagName !== tag) open.pop();
      if (!open.length || indent >= open.at(-1).indent + 2) {
        const list = make(tag);
        if (tag === "OL") list.start = parseInt(mark, 10);
        (open.at(-1)?.list.lastElementChild ?? root).append(list);
        open.push({ indent, list });
      }
      open.at(-1).list.append(make("li", "", ...inline(text)));
    }
    return root;
  },
};

// Return the nodes of a line: text, code, bold and italic.
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, code, bold, italic] = found;
    if (found.index > end) nodes.push(text.slice(end, found.index));
    if (code !== undefined) nodes.push(make("code", "", code));
    else nodes.push(make(bold === undefined ? "em" : "strong", "", ...inline(bold ?? italic)));
    end = found.index + whole.length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}
