// The ring: one arc per stage, one segment per block, and the tokens on their way round.
import { bitsClass } from "./stages.js";
import { html } from "./html.js";

const WIDTH = 480;
const HEIGHT = 356;
const CENTRE = [WIDTH / 2, HEIGHT / 2];
const OUTER = 138;
const INNER = 110;
const LABEL = 153;
const WIDEST_GAP = 13;
const MOST_TOKENS = 8;
const LONGEST_NAME = 15;
const LARGEST_FONT = 16; // The size of a label in a narrow window.
const LINE = 17;

function at(radius, degrees) {
  const angle = ((degrees - 90) * Math.PI) / 180;
  return [CENTRE[0] + radius * Math.cos(angle), CENTRE[1] + radius * Math.sin(angle)].map((value) =>
    value.toFixed(2),
  );
}

/** A segment of the band between two radii. */
function band(inner, outer, from, to) {
  const large = to - from > 180 ? 1 : 0;
  const [a, b, c, d] = [at(outer, from), at(outer, to), at(inner, to), at(inner, from)];
  return `M${a}A${outer} ${outer} 0 ${large} 1 ${b}L${c}A${inner} ${inner} 0 ${large} 0 ${d}Z`;
}

function arc(radius, from, to) {
  return `M${at(radius, from)}A${radius} ${radius} 0 ${to - from > 180 ? 1 : 0} 1 ${at(radius, to)}`;
}

/** Where each stage begins and ends, in degrees clockwise from the top. */
function spans(stages) {
  const gap = stages.length === 1 ? 4 : Math.min(WIDEST_GAP, 130 / stages.length);
  const count = stages.reduce((sum, stage) => sum + stage.bits.length, 0);
  const step = (360 - gap * stages.length) / count;
  let from = gap / 2;
  return stages.map((stage) => {
    const span = { from, to: from + step * stage.bits.length, step, gap };
    from = span.to + gap;
    return span;
  });
}

const pen = document.createElement("canvas").getContext("2d");

/** The longest beginning of a name that has room. Fonts differ in width by a third. */
function clipped(name, room) {
  pen.font = `${LARGEST_FONT}px ${getComputedStyle(document.body).fontFamily}`;
  let shown = name.length > LONGEST_NAME ? `${name.slice(0, LONGEST_NAME - 1)}…` : name;
  while (shown.length > 2 && pen.measureText(shown).width > room) {
    shown = `${shown.slice(0, -2)}…`;
  }
  return shown;
}

function Blocks({ stage, span }) {
  const between = Math.min(0.8, span.step / 5);
  return stage.blocks.map((block, index) => {
    const from = span.from + index * span.step;
    return html`<path
      key=${block.block}
      class=${`block ${bitsClass(block.bits)}`}
      d=${band(INNER, OUTER, from + between / 2, from + span.step - between / 2)}
    >
      <title>${`${block.name}: ${block.bits} bits, on ${stage.name}`}</title>
    </path>`;
  });
}

/** The lines that divide the arc of a team among its members. */
function Shares({ stage, span }) {
  let radius = INNER;
  return stage.members.slice(0, -1).map((member) => {
    radius += (OUTER - INNER) * (member.share ?? 1 / stage.members.length);
    return html`<path key=${member.device} class="share" d=${arc(radius, span.from, span.to)} />`;
  });
}

function Label({ stage, span }) {
  const middle = (span.from + span.to) / 2;
  const [x, y] = at(LABEL, middle).map(Number);
  const side = Math.sin((middle * Math.PI) / 180);
  const anchor = Math.abs(side) < 0.25 ? "middle" : side > 0 ? "start" : "end";
  const down = -Math.cos((middle * Math.PI) / 180);
  // Beside the ring, a name has the room to the edge, and a line of its own.
  const room = { start: WIDTH - x, end: x, middle: WIDTH }[anchor];
  const lines = anchor === "middle" ? 1 : 2;
  const base = y + 4 + 5 * down - (LINE / 2) * (lines - 1);
  return html`<text class="label" x=${x} y=${base} text-anchor=${anchor}>
    <tspan class="number">${stage.index + 1} </tspan>
    <tspan ...${lines > 1 ? { x, dy: LINE } : {}}>${clipped(stage.name, room)}</tspan>
    <title>${stage.name}</title>
  </text>`;
}

function Chevron({ span }) {
  const middle = span.to + span.gap / 2;
  const size = Math.min(3.6, span.gap / 3.2);
  const radius = (INNER + OUTER) / 2;
  const points = [
    at(radius + 6, middle - size / 2),
    at(radius, middle + size / 2),
    at(radius - 6, middle - size / 2),
  ];
  return html`<polyline class="chevron" points=${points.map(String).join(" ")} />`;
}

/** One dot for each sequence that the model answers now. */
function Tokens({ count }) {
  const shown = Math.min(count, MOST_TOKENS);
  const radius = (INNER + OUTER) / 2;
  return Array.from(
    { length: shown },
    (_, index) => html`<g key=${index} transform=${`rotate(${(360 * index) / shown} ${CENTRE.join(" ")})`}>
      <g class="orbit">
        <circle class="token" cx=${CENTRE[0]} cy=${CENTRE[1] - radius} r="5" />
      </g>
    </g>`,
  );
}

function described(stages) {
  const parts = stages.map((stage) => `${stage.name} with ${stage.bits.length} blocks`);
  return `Ring of ${stages.length === 1 ? "one stage" : `${stages.length} stages`}: ${parts.join(", ")}.`;
}

/** The ring of `stages`. `children` are shown in its middle, `flowing` sequences run round it. */
export function Ring({ stages, flowing = 0, children }) {
  const places = spans(stages);
  return html`<div class="ring">
    <svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label=${described(stages)}>
      <circle class="track" cx=${CENTRE[0]} cy=${CENTRE[1]} r=${(INNER + OUTER) / 2} />
      ${stages.map((stage, index) => {
        const span = places[index];
        return html`<g key=${stage.index} class=${stage.isLost ? "stage lost" : "stage"}>
          <${Blocks} stage=${stage} span=${span} />
          <${Shares} stage=${stage} span=${span} />
          ${stage.bottleneck &&
          html`<path class="bottleneck" d=${arc(OUTER + 5, span.from, span.to)} />`}
          ${stage.isLost && html`<path class="outage" d=${band(INNER, OUTER, span.from, span.to)} />`}
          <${Label} stage=${stage} span=${span} />
          ${stages.length > 1 && html`<${Chevron} span=${span} />`}
        </g>`;
      })}
      <${Tokens} count=${flowing} />
    </svg>
    <div class="ring-middle">${children}</div>
  </div>`;
}
