// Shows a model's answer. The answer is a stranger's text: it becomes elements and text nodes, one
// by one, and never markup. HTML in it is shown as it was written, and no picture is fetched.
import { useMemo, useState } from "./vendor/hooks.js";
import { Lexer } from "./vendor/marked.js";
import { copyText } from "./clipboard.js";
import { html } from "./html.js";

const SCHEMES = ["http:", "https:", "mailto:"];
const MOST_LEXED = 200_000;
const DEEPEST = 24;

/** The address of a link if it leads to another page, or null. */
export function safeAddress(text) {
  try {
    const address = new URL(text);
    return SCHEMES.includes(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

function Code({ text, language }) {
  const [said, setSaid] = useState("Copy");
  async function copy() {
    try {
      await copyText(text);
      setSaid("Copied");
    } catch {
      setSaid("Not copied");
    }
    setTimeout(() => setSaid("Copy"), 1500);
  }
  return html`<div class="code">
    <div class="code-head">
      <span>${language}</span><button type="button" onClick=${copy}>${said}</button>
    </div>
    <pre tabindex="0"><code>${text}</code></pre>
  </div>`;
}

function Cells({ cells, name, align, depth }) {
  return html`<tr>
    ${cells.map(
      (cell, index) =>
        html`<${name} key=${index} class=${`align-${align[index] ?? "left"}`}
          >${inline(cell.tokens, depth)}<//
        >`,
    )}
  </tr>`;
}

function Items({ token, depth }) {
  const items = token.items.map(
    (item, index) =>
      html`<li key=${index}>
        ${item.task &&
        html`<input type="checkbox" disabled checked=${item.checked} aria-label="task" /> `}${blocks(
          item.tokens,
          depth,
        )}
      </li>`,
  );
  return token.ordered
    ? html`<ol start=${token.start || 1}>
        ${items}
      </ol>`
    : html`<ul>
        ${items}
      </ul>`;
}

function Table({ token, depth }) {
  const align = token.align;
  return html`<div class="table-scroll" tabindex="0">
    <table>
      <thead>
        <${Cells} cells=${token.header} name="th" align=${align} depth=${depth} />
      </thead>
      <tbody>
        ${token.rows.map(
          (row, index) =>
            html`<${Cells} key=${index} cells=${row} name="td" align=${align} depth=${depth} />`,
        )}
      </tbody>
    </table>
  </div>`;
}

const BLOCKS = {
  space: () => null,
  def: () => null,
  hr: () => html`<hr />`,
  code: (token) => html`<${Code} text=${token.text} language=${(token.lang ?? "").slice(0, 30)} />`,
  heading: (token, depth) =>
    html`<p class=${`heading heading-${Math.min(token.depth, 4)}`}>${inline(token.tokens, depth)}</p>`,
  blockquote: (token, depth) => html`<blockquote>${blocks(token.tokens, depth)}</blockquote>`,
  list: (token, depth) => html`<${Items} token=${token} depth=${depth} />`,
  table: (token, depth) => html`<${Table} token=${token} depth=${depth} />`,
  paragraph: (token, depth) => html`<p>${inline(token.tokens, depth)}</p>`,
};

const INLINE = {
  br: () => html`<br />`,
  strong: (token, depth) => html`<strong>${inline(token.tokens, depth)}</strong>`,
  em: (token, depth) => html`<em>${inline(token.tokens, depth)}</em>`,
  del: (token, depth) => html`<del>${inline(token.tokens, depth)}</del>`,
  codespan: (token) => html`<code>${token.text}</code>`,
  image: (token) => token.raw,
  link: (token, depth) => {
    const address = safeAddress(token.href);
    return address === null
      ? token.raw
      : html`<a href=${address} target="_blank" rel="noopener noreferrer nofollow"
          >${inline(token.tokens, depth)}</a
        >`;
  },
};

/** Text within a block. */
function inline(tokens, depth) {
  return (tokens ?? []).map((token) => {
    if (depth > DEEPEST) return token.raw;
    const show = INLINE[token.type];
    if (show) return show(token, depth + 1);
    return token.tokens ? inline(token.tokens, depth + 1) : (token.text ?? token.raw);
  });
}

/** Paragraphs, lists and the like. A kind that is not known here is shown as it was written. */
function blocks(tokens, depth) {
  return tokens.map((token) => {
    if (depth > DEEPEST) return token.raw;
    const show = BLOCKS[token.type];
    if (show) return show(token, depth + 1);
    if (token.tokens) return inline(token.tokens, depth + 1);
    return token.type === "text" ? token.text : html`<p>${token.raw}</p>`;
  });
}

export function Markdown({ text }) {
  const tokens = useMemo(() => (text.length > MOST_LEXED ? null : lexed(text)), [text]);
  return html`<div class="markdown">
    ${tokens === null ? html`<p class="plain">${text}</p>` : blocks(tokens, 0)}
  </div>`;
}

/** The tokens of a text, or null if the lexer fails over it. */
function lexed(text) {
  try {
    return new Lexer({ gfm: true, breaks: true }).lex(text);
  } catch {
    return null;
  }
}
