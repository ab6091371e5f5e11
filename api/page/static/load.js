// The dialog that plans a model ("what if") and loads it.
import { useEffect, useRef, useState } from "./vendor/hooks.js";
import { operate } from "./api.js";
import { bytes, ms, rate } from "./format.js";
import { html } from "./html.js";
import { PlanView, Progress, secondsOf, unitOf } from "./model.js";

const WIDTHS = [2, 3, 4, 5, 6, 8, 16, 32];
const DEFAULT_WIDTHS = [3, 4, 5, 6, 8];
const RECENT = "shoal.models";
const OBJECTIVES = [
  ["request", "a whole request"],
  ["latency", "one token's latency"],
  ["throughput", "tokens of many at once"],
  ["energy", "joules"],
];

function recent() {
  try {
    return JSON.parse(localStorage.getItem(RECENT)) ?? [];
  } catch {
    return [];
  }
}

function remember(model) {
  localStorage.setItem(RECENT, JSON.stringify([model, ...recent().filter((one) => one !== model)].slice(0, 8)));
}

/** "0:pi-1, 3-5:nano" -> {0: "pi-1", 3: "nano", 4: "nano", 5: "nano"}. Throws for other texts. */
export function pinsOf(text) {
  const pins = {};
  for (const part of text.split(",").map((word) => word.trim()).filter(Boolean)) {
    const found = /^(\d+)(?:-(\d+))?:(.+)$/.exec(part);
    if (!found) throw new Error(`pins: ${part}: write BLOCK:DEVICE or FIRST-LAST:DEVICE`);
    const [, first, last, device] = found;
    const end = Number(last ?? first);
    if (end - Number(first) > 1000) throw new Error(`pins: ${part}: too many blocks`);
    for (let block = Number(first); block <= end; block += 1) pins[block] = device.trim();
  }
  return pins;
}

/** The coordinator's request for what the form says. Empty fields are left to its defaults. */
export function requestOf(form) {
  const body = { model: form.model.trim(), bits: form.bits, objective: { kind: form.objective } };
  if (form.context) body.context_tokens = Number(form.context);
  if (form.slots) body.slots = Number(form.slots);
  if (form.budget) body.quality_budget = Number(form.budget);
  if (form.exclude.length) body.exclude = form.exclude;
  if (form.noTeams) body.no_teams = true;
  if (form.replaces) body.replaces = true;
  const pins = pinsOf(form.pins);
  if (Object.keys(pins).length) body.pins = pins;
  return body;
}

function Comparison({ before, after }) {
  if (!before?.plan) return null;
  if (Boolean(before.plan.encodes) !== Boolean(after.encodes)) return null;
  const change = secondsOf(after) / secondsOf(before.plan) - 1;
  const memory = (plan) => plan.stages.reduce((sum, stage) => sum + stage.memory_bytes, 0);
  const now =
    `Loaded now: ${before.model}, predicted ${ms(secondsOf(before.plan))} ms ` +
    `${unitOf(before.plan)}, ${bytes(memory(before.plan))}. This plan: `;
  const difference = `${change >= 0 ? "+" : "−"}${Math.abs(100 * change).toFixed(0)} % time`;
  return html`<p class="comparison">${now}<b>${difference}</b>${`, ${bytes(memory(after))}.`}</p>`;
}

function Preview({ planned, current }) {
  const { plan } = planned;
  const proof = plan.proven_optimal
    ? "proven optimal"
    : `within ${(100 * plan.gap).toFixed(1)} % of the optimum`;
  const tokens = (plan.encodes ? plan.prompt_tokens : 1) / secondsOf(plan);
  const speed = ` ${unitOf(plan)} (${rate(tokens)} tokens/s), predicted. It is ${proof}.`;
  return html`<div class="preview" role="region" aria-label="The plan">
    <p><b>${planned.model}</b> would take <b>${ms(secondsOf(plan))} ms</b>${speed}</p>
    <${Comparison} before=${current} after=${plan} />
    <${PlanView}
      model=${planned}
      planned
      middle=${html`<span class="big">${ms(secondsOf(plan))}<span class="unit"> ms</span></span>
        <span class="small">${unitOf(plan)}, predicted</span>`}
    />
    ${(planned.weights ?? []).map((line) => html`<p key=${line} class="quiet small">${line}</p>`)}
  </div>`;
}

function first(current) {
  return {
    model: current?.directory ?? recent()[0] ?? "",
    bits: DEFAULT_WIDTHS,
    objective: "request",
    context: "",
    slots: "",
    budget: "",
    exclude: [],
    pins: "",
    noTeams: false,
    replaces: false,
  };
}

function toggled(list, item, isIn) {
  const others = list.filter((one) => one !== item);
  return isIn ? [...others, item] : others;
}

function Fields({ form, devices, change }) {
  const names = [...new Set([...recent(), form.model].filter(Boolean))];
  return html`
    <label class="field wide">
      <span>Model</span>
      <input
        required
        autofocus
        list="known-models"
        placeholder="ORG/NAME, or an absolute path on the coordinator"
        autocomplete="off"
        spellcheck=${false}
        value=${form.model}
        onInput=${(event) => change({ model: event.target.value })}
      />
      <datalist id="known-models">
        ${names.map((name) => html`<option key=${name} value=${name}></option>`)}
      </datalist>
    </label>
    <fieldset class="field wide">
      <legend>Bits a block may have</legend>
      <div class="checks">
        ${WIDTHS.map(
          (width) =>
            html`<label key=${width} class="check">
              <input
                type="checkbox"
                checked=${form.bits.includes(width)}
                onChange=${({ target }) => change((now) => ({ bits: toggled(now.bits, width, target.checked) }))}
              />${width}
            </label>`,
        )}
      </div>
    </fieldset>
    <label class="field">
      <span>Minimise</span>
      <select value=${form.objective} onChange=${(event) => change({ objective: event.target.value })}>
        ${OBJECTIVES.map(([kind, words]) => html`<option key=${kind} value=${kind}>${words}</option>`)}
      </select>
    </label>
    <label class="field">
      <span>Context, tokens</span>
      <input
        type="number"
        min="1"
        placeholder="2048"
        value=${form.context}
        onInput=${(event) => change({ context: event.target.value })}
      />
    </label>
    <label class="field">
      <span>Sequences at once</span>
      <input
        type="number"
        min="1"
        max="64"
        placeholder=${form.objective === "throughput" ? "4" : "1"}
        value=${form.slots}
        onInput=${(event) => change({ slots: event.target.value })}
      />
    </label>
    <label class="field">
      <span>Loss budget, nats</span>
      <input
        type="number"
        min="0"
        step="any"
        placeholder="default"
        value=${form.budget}
        onInput=${(event) => change({ budget: event.target.value })}
      />
    </label>
    ${devices.length > 0 &&
    html`<fieldset class="field wide">
      <legend>Devices that may take part</legend>
      <div class="checks">
        ${devices.map(
          (name) =>
            html`<label key=${name} class="check">
              <input
                type="checkbox"
                checked=${!form.exclude.includes(name)}
                onChange=${({ target }) =>
                  change((now) => ({ exclude: toggled(now.exclude, name, !target.checked) }))}
              />${name}
            </label>`,
        )}
        <label class="check">
          <input
            type="checkbox"
            checked=${!form.noTeams}
            onChange=${(event) => change({ noTeams: !event.target.checked })}
          />they may share layers
        </label>
      </div>
    </fieldset>`}
    <label class="check">
      <input
        type="checkbox"
        checked=${form.replaces}
        onChange=${(event) => change({ replaces: event.target.checked })}
      />end other models first
    </label>
    <label class="field wide">
      <span>Pins</span>
      <input
        placeholder="none, or for example 0:pi-1, 3-5:nano (0 is the embedding)"
        autocomplete="off"
        spellcheck=${false}
        value=${form.pins}
        onInput=${(event) => change({ pins: event.target.value })}
      />
    </label>
  `;
}

export function LoadDialog({ state, onClose, onKey }) {
  const current = state.models[0] ?? null;
  const dialog = useRef(null);
  const [form, setForm] = useState(() => first(current));
  const [planned, setPlanned] = useState(null);
  const [running, setRunning] = useState(null);
  const [steps, setSteps] = useState([]);
  const [said, setSaid] = useState("");

  useEffect(() => {
    dialog.current.showModal();
  }, []);

  // `fields` may be a function of the form as it is now, for changes that follow each other fast.
  const change = (fields) => {
    setForm((now) => ({ ...now, ...(typeof fields === "function" ? fields(now) : fields) }));
    setPlanned(null);
    setSaid("");
  };

  async function run(what) {
    const control = new AbortController();
    setRunning({ what, control });
    setSteps([]);
    setSaid("");
    try {
      const body = requestOf(form);
      const onStep = (step) =>
        setSteps((known) => [...known.filter((one) => one.phase !== step.phase || one.label !== step.label), step].slice(-64));
      const result = await operate(`/shoal/v1/${what}`, body, onStep, control.signal);
      remember(body.model);
      if (what === "load") onClose();
      else setPlanned(result);
    } catch (error) {
      onKey(error);
      setSaid(control.signal.aborted ? "Stopped." : error.message);
    } finally {
      setRunning(null);
    }
  }

  function submitted(event) {
    event.preventDefault();
    run("plan");
  }

  const isReady = form.model.trim() && form.bits.length > 0 && !running;
  return html`<dialog
    ref=${dialog}
    class="dialog"
    aria-labelledby="load-title"
    onClose=${onClose}
    onCancel=${(event) => running && event.preventDefault()}
  >
    <form onSubmit=${submitted}>
      <header class="card-head">
        <h2 id="load-title">Plan or load a model</h2>
        <button type="button" class="quiet-button" disabled=${Boolean(running)} onClick=${onClose}>
          Close
        </button>
      </header>
      <div class="settings">
        <${Fields}
          form=${form}
          devices=${state.devices.filter((one) => one.state === "here").map((one) => one.name)}
          change=${change}
        />
      </div>
      <div class="dialog-buttons">
        ${running
          ? html`<button type="button" class="stop" onClick=${() => running.control.abort()}>
              Stop
            </button>`
          : html`<button type="submit" disabled=${!isReady}>Preview the plan</button>
              <button
                type="button"
                class="main-button"
                disabled=${!isReady}
                onClick=${() => run("load")}
              >
                Load
              </button>`}
        <p class="quiet small">
          ${planned || running
            ? ""
            : "A preview loads nothing. Other models stay loaded, if they do not end."}
        </p>
      </div>
    </form>
    <div role="status">
      ${said && html`<p class="notice notice-bad">${said}</p>`}
      ${running && html`<${Progress} steps=${steps} />`}
    </div>
    ${planned && html`<${Preview} planned=${planned} current=${current} />`}
  </dialog>`;
}
