// The model at work: its ring, and each stage and hop with predicted and measured times.
import { bitRuns, blockRange, bytes, ms, plural, rate, took } from "./format.js";
import { html } from "./html.js";
import { Ring } from "./ring.js";
import { bitsClass, stagesOf, widthsOf } from "./stages.js";

const WORDS = {
  ready: "ready",
  loading: "loading",
  resuming: "resuming",
  asleep: "asleep",
  recovering: "recovering",
  broken: "broken",
};

export function StatePill({ model }) {
  return html`<span class=${`pill pill-${model.state}`}>${WORDS[model.state] ?? model.state}</span>`;
}

/** Answers with fewer tokens say little about the time of one. */
const FEWEST_TOKENS = 16;

/** The measured seconds of a token: of the answers that run now, else of the last one. */
export function measuredTokenS(requests) {
  const long = requests.filter((one) => one.token_s && one.answer_tokens >= FEWEST_TOKENS);
  const running = long.filter((one) => one.state === "answering");
  if (running.length) return running.reduce((sum, one) => sum + one.token_s, 0) / running.length;
  return long[0]?.token_s ?? null;
}

/** Tokens per second of all answers together. */
export function tokensPerS(requests) {
  return requests
    .filter((one) => one.state === "answering" && one.token_s)
    .reduce((sum, one) => sum + 1 / one.token_s, 0);
}

export function Figure({ seconds, unmeasured = "not measured" }) {
  return seconds === null || seconds === undefined
    ? html`<span class="unmeasured">${unmeasured}</span>`
    : html`${ms(seconds)}`;
}

function Legend({ widths }) {
  return html`<ul class="legend" aria-label="Bits per weight">
    ${widths.map(
      (width) =>
        html`<li key=${width}><span class=${`swatch ${bitsClass(width)}`}></span>${width} bits</li>`,
    )}
  </ul>`;
}

/** Two bars below each other: predicted above, measured below. */
function Bars({ predictedS, measuredS, longestS }) {
  const width = (seconds) => `${Math.max(1, (100 * seconds) / longestS)}%`;
  return html`<span class="bars" aria-hidden="true">
    <span class="bar predicted" style=${{ width: width(predictedS) }}></span>
    ${measuredS !== null &&
    html`<span class="bar measured" style=${{ width: width(measuredS) }}></span>`}
  </span>`;
}

function StageRow({ stage, longestS, planned }) {
  const names = stage.blocks.map((block) => block.name);
  return html`<tr class=${stage.isLost ? "is-lost" : ""}>
    <th scope="row">
      <span class="stage-name">
        <span>
          <span class="stage-number">${stage.index + 1}</span>${" "}
          <span class="name" title=${stage.name}>${stage.name}</span>
        </span>
        ${stage.bottleneck &&
        html`<span class="tag tag-slow" title=${`slowest stage with its hop, as ${stage.bottleneck}`}>
          bottleneck
        </span>`}
        ${stage.isLost && html`<span class="tag tag-lost">lost</span>`}
      </span>
      <span class="detail" title=${`of ${bytes(stage.limitBytes)} that it may take`}>
        ${blockRange(names)}<span class="dot">·</span>${bytes(stage.memoryBytes)}
      </span>
      <span class="detail">${bitRuns(stage.bits)} bits</span>
      <${Bars} ...${stage} longestS=${longestS} />
    </th>
    <td><${Figure} seconds=${stage.predictedS} /></td>
    ${!planned &&
    html`<td>
      <${Figure}
        seconds=${stage.measuredS}
        unmeasured=${stage.members.length ? "see below" : undefined}
      />
    </td>`}
  </tr>`;
}

function MemberRow({ member, planned }) {
  return html`<tr class="member">
    <th scope="row">
      ${member.device}
      <span class="detail"
        >${member.share ? `${Math.round(100 * member.share)} % of each layer` : "a share"}, without waits</span
      >
    </th>
    <td><${Figure} seconds=${member.predictedS} /></td>
    ${!planned && html`<td><${Figure} seconds=${member.measuredS} /></td>`}
  </tr>`;
}

function HopRow({ hop, planned, encodes }) {
  return html`<tr class="hop">
    <th scope="row">
      <span aria-hidden="true">↓</span> ${hop.isReturn ? `${encodes ? "result" : "token"} back to` : "hop to"} ${hop.target}
      ${hop.bits && html`<span class="dot">·</span>${hop.bits} bits`}
    </th>
    <td><${Figure} seconds=${hop.predictedS} /></td>
    ${!planned &&
    html`<td title="half of a round trip of the idle link"><${Figure} seconds=${hop.measuredS} /></td>`}
  </tr>`;
}

/** What a token takes in all. What the stages do not take is hops, and work between them. */
function SumRows({ stages, tokenS, planned, encodes }) {
  if (planned || stages.length < 2) return null;
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const hopsS = sum(stages.map((stage) => stage.hop.predictedS));
  const stagesS = sum(stages.map((stage) => stage.predictedS));
  const isMeasured = tokenS !== null && stages.every((stage) => stage.measuredS !== null);
  const restS = isMeasured ? tokenS - sum(stages.map((stage) => stage.measuredS)) : null;
  const rows = [
    ["between the stages, in use", hopsS, restS !== null && restS > 0 ? restS : null],
    [`a ${encodes ? "pass" : "token"} in all`, stagesS + hopsS, tokenS],
  ];
  return html`<tfoot>
    ${rows.map(
      ([name, predictedS, measuredS]) =>
        html`<tr key=${name}>
          <th scope="row">${name}</th>
          <td><${Figure} seconds=${predictedS} /></td>
          <td><${Figure} seconds=${measuredS} /></td>
        </tr>`,
    )}
  </tfoot>`;
}

/** The stages as a table. `planned`: nothing of it is loaded, so nothing can be measured. */
export function StageTable({ stages, tokenS = null, planned = false, encodes = false }) {
  const times = stages.flatMap((stage) => [stage.predictedS, stage.measuredS ?? 0]);
  const longestS = Math.max(...times, 1e-9);
  return html`<table class="stages">
    <caption class="hidden">
      Stages and hops in the order of the ring, in milliseconds a ${encodes ? "pass" : "token"}
    </caption>
    <thead>
      <tr>
        <th scope="col">Stage</th>
        <th scope="col">predicted <span class="unit">ms</span></th>
        ${!planned && html`<th scope="col">measured <span class="unit">ms</span></th>`}
      </tr>
    </thead>
    <tbody>
      ${stages.map((stage) => [
        html`<${StageRow}
          key=${stage.index}
          stage=${stage}
          longestS=${longestS}
          planned=${planned}
        />`,
        stage.members.map(
          (member) =>
            html`<${MemberRow}
              key=${`${stage.index} ${member.device}`}
              member=${member}
              planned=${planned}
            />`,
        ),
        stage.hop &&
          html`<${HopRow}
            key=${`hop ${stage.index}`}
            hop=${stage.hop}
            planned=${planned}
            encodes=${encodes}
          />`,
      ])}
    </tbody>
    <${SumRows} stages=${stages} tokenS=${tokenS} planned=${planned} encodes=${encodes} />
  </table>`;
}

/** Ring and table of a plan side by side. */
export function PlanView({ model, lost, flowing, tokenS, planned, middle }) {
  const stages = stagesOf(model, lost);
  return html`<div class="plan">
    <div class="plan-ring">
      <${Ring} stages=${stages} flowing=${flowing}>${middle}<//>
      <${Legend} widths=${widthsOf(stages)} />
    </div>
    <${StageTable}
      stages=${stages}
      tokenS=${tokenS}
      planned=${planned}
      encodes=${Boolean(model.plan.encodes)}
    />
  </div>`;
}

/** The predicted seconds of a token, or of an encoder's pass. */
export function secondsOf(plan) {
  return (plan.encodes ? plan.predicted_ms_per_pass : plan.predicted_ms_per_token) / 1e3;
}

export function unitOf(plan) {
  return plan.encodes ? "a pass" : "a token";
}

/** What the load asked for beside the plan. */
function wishesOf(model) {
  const wishes = [];
  if (model.keep_s) wishes.push(["unloads", `after ${took(model.keep_s)} without a request`]);
  if (model.weight && model.weight !== 1) wishes.push(["weight", `${model.weight} on shared devices`]);
  const together = Object.entries(model.together ?? {});
  if (together.length) {
    wishes.push(["planned with", together.map(([name, weight]) => `${name} ${weight}`).join(", ")]);
  }
  return wishes;
}

function useOf(model, requests) {
  const { slots } = model;
  if (!slots) return [["texts", plural(model.requests, "request")]];
  const together = tokensPerS(requests);
  const classes = Object.entries(slots.classes ?? {}).map(([name, count]) => `${count} ${name}`);
  const line = slots.waiting ? `, ${slots.waiting} in line` : "";
  return [
    ["now", together ? `${rate(together)} tokens/s` : "idle"],
    ["sequences", `${slots.used} of ${slots.total}${classes.length ? ` (${classes.join(", ")})` : ""}${line}`],
  ];
}

function Middle({ model, requests }) {
  const { plan } = model;
  const predictedS = secondsOf(plan);
  const measuredS = plan.encodes ? null : measuredTokenS(requests);
  const shown = measuredS ?? predictedS;
  return html`
    <span class="big">${ms(shown)}<span class="unit"> ms</span></span>
    <span class="small">${unitOf(plan)}, ${measuredS === null ? "predicted" : "measured"}</span>
    <span class="small quiet">
      ${plan.encodes
        ? `of ${plural(plan.prompt_tokens, "token")}`
        : measuredS === null
          ? "not measured yet"
          : `predicted ${ms(predictedS)} ms`}
    </span>
  `;
}

function lossOf(plan, quality) {
  if (quality?.measured_kl != null) return ["loss", `${quality.measured_kl.toPrecision(2)} nats, measured`];
  if (plan.total_sensitivity == null) return null;
  return ["loss", `${plan.total_sensitivity.toPrecision(2)} nats, predicted`];
}

function Facts({ model, requests }) {
  const { plan, quality } = model;
  const facts = [
    ...useOf(model, requests),
    ["context", plural(model.context_tokens, "token")],
    ...wishesOf(model),
    plan.prompt_tokens && !plan.encodes && [
      `first token after ${plan.prompt_tokens}`,
      `${took(plan.predicted_first_token_s)}, predicted`,
    ],
    lossOf(plan, quality),
    ["plan", plan.proven_optimal ? "proven optimal" : `${(100 * plan.gap).toFixed(1)} % from the bound`],
  ];
  return html`<dl class="facts">
    ${facts
      .filter(Boolean)
      .map(
        ([name, value]) =>
          html`<div key=${name}>
            <dt>${name}</dt>
            <dd>${value}</dd>
          </div>`,
      )}
  </dl>`;
}

const PHASES = {
  wait: "waiting",
  measure: "measuring blocks",
  links: "measuring links",
  "weight errors": "measuring weight errors",
  plan: "solving the plan",
  quantize: "quantizing blocks",
  quality: "measuring what fewer bits lose",
  check: "measuring what the plan loses",
  load: "loading stages",
  files: "having files made",
  fetch: "fetching",
};

/** The progress of an operation: one bar per device or file of its newest phase. */
export function Progress({ steps }) {
  const newest = steps[steps.length - 1];
  if (!newest) return html`<p class="quiet">Working…</p>`;
  const shown = steps.filter((step) => step.phase === newest.phase);
  return html`<div class="progress" role="group" aria-label="Progress">
    <p>${PHASES[newest.phase] ?? newest.phase}</p>
    ${shown.map((step) => {
      const amount =
        step.total && step.unit === "bytes"
          ? `${bytes(step.done)} of ${bytes(step.total)}`
          : step.total
            ? `${step.done} of ${step.total}`
            : "";
      return html`<label key=${step.label} class="progress-row">
        <span class="name">${step.label || "all"}</span>
        ${step.total > 0 && html`<progress max=${step.total} value=${step.done}></progress>`}
        <span class="amount">${amount}</span>
      </label>`;
    })}
  </div>`;
}

function Trouble({ model }) {
  const waiting = model.waiting_for?.length ? `Waiting for ${model.waiting_for.join(", ")}. ` : "";
  const reason = model.reason ?? "";
  if (!waiting && !reason && !model.slow?.length) return null;
  return html`<div class=${model.state === "ready" ? "notice" : "notice notice-bad"} role="status">
    ${(waiting || reason) && html`<p>${waiting}${reason}</p>`}
    ${(model.slow ?? []).map((text) => html`<p key=${text}>${text}</p>`)}
  </div>`;
}

/** The card of one model. */
export function ModelCard({ model, operation, requests, lost, onUnload }) {
  const own = requests.filter((request) => !request.model || request.model === model.model);
  const isBusy = model.state === "loading" || model.state === "resuming" || model.state === "recovering";
  return html`<section class="card model" aria-label=${model.model}>
    <header class="card-head">
      <h2><span class="name">${model.model}</span> <${StatePill} model=${model} /></h2>
      ${model.state !== "loading" &&
      html`<button type="button" class="quiet-button" onClick=${onUnload}>Unload</button>`}
    </header>
    <${Trouble} model=${model} />
    ${model.state === "asleep" &&
    html`<p class="quiet">Nobody has used it for a while. The next request that names it loads it again.</p>`}
    ${isBusy && operation && html`<${Progress} steps=${operation.steps} />`}
    ${model.plan &&
    html`<${PlanView}
      model=${model}
      lost=${lost}
      tokenS=${model.plan.encodes ? null : measuredTokenS(own)}
      flowing=${model.state === "ready" ? own.filter((one) => one.state === "answering" || one.state === "prompt").length : 0}
      middle=${html`<${Middle} model=${model} requests=${own} />`}
    />`}
    ${model.plan && html`<${Facts} model=${model} requests=${own} />`}
  </section>`;
}
