// The page: it follows the state of the shoal, and shows it.
import { render } from "./vendor/preact.js";
import { useCallback, useEffect, useState } from "./vendor/hooks.js";
import { EventsCard, RequestsCard } from "./activity.js";
import { ask, followState, hasKey, KeyNeeded, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Devices } from "./devices.js";
import { rate } from "./format.js";
import { html } from "./html.js";
import { LoadDialog } from "./load.js";
import { ModelCard, Progress, StatePill, tokensPerS } from "./model.js";

const THEME = "shoal.theme";
const THEMES = ["auto", "light", "dark"];

function useTheme() {
  const [theme, setTheme] = useState(() => localStorage.getItem(THEME) ?? "auto");
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem(THEME, theme);
  }, [theme]);
  return [theme, () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length])];
}

/** The time of day in seconds, once a second. */
function useNow() {
  const [nowS, setNow] = useState(() => Date.now() / 1e3);
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now() / 1e3), 1000);
    return () => clearInterval(timer);
  }, []);
  return nowS;
}

/** The state, whether the coordinator answers, and a function that begins again with a new key. */
function useShoal() {
  const [state, setState] = useState(null);
  const [contact, setContact] = useState("first");
  const [attempt, setAttempt] = useState(0);
  useEffect(
    () =>
      whileVisible((signal) =>
        followState(
          signal,
          (parts) => setState((known) => ({ ...known, ...parts })),
          (now) => setContact((known) => (now === "lost" && known === "first" ? "first" : now)),
        ),
      ),
    [attempt],
  );
  return [state, contact, setContact, () => setAttempt((count) => count + 1)];
}

/**
 * Run `work(signal)` while the page is visible. Returns a function that ends it.
 * Browsers open few connections to one server, so pages that nobody sees must hold none.
 */
function whileVisible(work) {
  let control = null;
  const stop = () => {
    control?.abort();
    control = null;
  };
  const changed = () => {
    if (document.hidden) stop();
    else if (control === null) {
      control = new AbortController();
      work(control.signal);
    }
  };
  document.addEventListener("visibilitychange", changed);
  window.addEventListener("pagehide", stop);
  window.addEventListener("pageshow", changed);
  changed();
  return () => {
    stop();
    document.removeEventListener("visibilitychange", changed);
    window.removeEventListener("pagehide", stop);
    window.removeEventListener("pageshow", changed);
  };
}

function KeyForm({ onDone }) {
  const [value, setValue] = useState("");
  const [remembers, setRemembers] = useState(false);
  const wasWrong = hasKey();
  function submit(event) {
    event.preventDefault();
    setKey(value, remembers);
    onDone();
  }
  return html`<main class="alone">
    <form class="card key-form" onSubmit=${submit}>
      <h1>This shoal asks for an API key</h1>
      <p>${wasWrong ? "The key is not known here, or was revoked. " : ""}On the coordinator's machine, <code>shoal key create NAME</code> makes one.</p>
      <label class="field wide">
        <span>API key</span>
        <input
          type="password"
          required
          autofocus
          autocomplete="current-password"
          value=${value}
          onInput=${(event) => setValue(event.target.value)}
        />
      </label>
      <label class="check">
        <input
          type="checkbox"
          checked=${remembers}
          onChange=${(event) => setRemembers(event.target.checked)}
        />remember it in this browser
      </label>
      <button type="submit" class="main-button">Use this key</button>
    </form>
  </main>`;
}

function Fish() {
  return html`<svg class="fish" viewBox="0 0 32 32" aria-hidden="true">
    <path d="M12.500 10.500c4.200-4 9.500-4 13.500 0l3-2.600v8.200l-3-2.600c-4 4-9.300 4-13.500 0a2.200 2.200 0 0 1 0-3z" />
    <path d="M2.500 15.800c3.400-3.300 7.800-3.300 11 0l2.500-2.100v6.700l-2.500-2.100c-3.200 3.300-7.600 3.300-11 0a1.800 1.800 0 0 1 0-2.500z" opacity=".75" />
    <path d="M14.100 21.600c3-2.800 6.700-2.800 9.500 0l2.100-1.800v5.700l-2.100-1.800c-2.800 2.800-6.500 2.800-9.500 0a1.500 1.500 0 0 1 0-2.100z" opacity=".5" />
  </svg>`;
}

/** A disc, one half of it dark. */
function Half() {
  return html`<svg viewBox="0 0 16 16" aria-hidden="true">
    <circle cx="8" cy="8" r="6.500" /><path d="M8 1.500a6.500 6.500 0 0 1 0 13z" />
  </svg>`;
}

function Head({ state, contact, theme, onTheme, onLoad }) {
  const isWell = (model) => model.state === "ready" || model.state === "asleep";
  const model = state?.models.find((one) => !isWell(one)) ?? state?.models[0];
  const perS = state ? tokensPerS(state.requests) : 0;
  return html`<header class="top">
    <h1><${Fish} />shoal${state && state.shoal.cluster !== "shoal" && html`<span class="cluster">${state.shoal.cluster}</span>`}</h1>
    <p class="top-state" role="status">
      ${contact !== "live"
        ? html`<span class="pill pill-broken">no contact</span>`
        : model
          ? html`<${StatePill} model=${model} /><span class="top-model">${model.model}</span>`
          : html`<span class="pill">no model</span>`}
      ${perS > 0 && html`<span class="top-rate">${rate(perS)} tokens/s</span>`}
    </p>
    <div class="head-buttons">
      <button
        type="button"
        class="quiet-button theme"
        onClick=${onTheme}
        aria-label=${`Colours: ${theme}`}
        title=${`Colours: ${theme}`}
      >
        <${Half} /><span class="wide-only">${theme}</span>
      </button>
      <button type="button" class="main-button" onClick=${onLoad} disabled=${!state}>
        Load<span class="wide-only"> a model</span>
      </button>
    </div>
  </header>`;
}

function NoModel({ state, onLoad }) {
  const here = state.devices.filter((device) => device.state === "here").length;
  return html`<section class="card empty-card" aria-labelledby="no-model">
    <h2 id="no-model">No model is loaded</h2>
    ${state.operation
      ? html`<p class="quiet">${state.operation.what || "An operation runs."}</p>
          <${Progress} steps=${state.operation.steps} />`
      : here
        ? html`<p>
              ${here === 1 ? "One device is" : `${here} devices are`} ready to share one. Its plan is shown
              before anything is loaded.
            </p>
            <button type="button" onClick=${onLoad}>Plan or load a model</button>`
        : html`<p>A model can be loaded once a device has joined.</p>`}
  </section>`;
}

function Views({ view, setView }) {
  return html`<nav class="views" aria-label="Views">
    ${["shoal", "chat"].map(
      (name) =>
        html`<button
          type="button"
          key=${name}
          aria-current=${view === name ? "page" : undefined}
          onClick=${() => setView(name)}
        >
          ${name === "shoal" ? "Shoal" : "Chat"}
        </button>`,
    )}
  </nav>`;
}

function Shoal({ state, nowS, onLoad, onUnload }) {
  const lost = new Set(
    state.devices.filter((device) => device.state === "lost").map((device) => device.name),
  );
  return html`
    ${state.models.map(
      (model) =>
        html`<${ModelCard}
          key=${model.model}
          model=${model}
          operation=${state.operation}
          requests=${state.requests}
          lost=${lost}
          onUnload=${() => onUnload(model.model)}
        />`,
    )}
    ${!state.models.length && html`<${NoModel} state=${state} onLoad=${onLoad} />`}
    <${Devices} state=${state} nowS=${nowS} />
    <div class="pair">
      <${RequestsCard} requests=${state.requests} nowS=${nowS} />
      <${EventsCard} events=${state.events} />
    </div>
  `;
}

/** Which of several models the chat talks to. */
function Choice({ models, chosen, onChoose }) {
  if (models.length < 2) return null;
  return html`<label class="field wide">
    <span>Chat with</span>
    <select value=${chosen.model} onChange=${(event) => onChoose(event.target.value)}>
      ${models.map(({ model }) => html`<option key=${model} value=${model}>${model}</option>`)}
    </select>
  </label>`;
}

function App() {
  const [theme, nextTheme] = useTheme();
  const [state, contact, setContact, reconnect] = useShoal();
  const [view, setView] = useState("shoal");
  const [isLoading, setLoading] = useState(false);
  const [chosen, setChosen] = useState(null);
  const [said, setSaid] = useState("");
  const [firstVersion, setFirstVersion] = useState(null);
  const nowS = useNow();
  const closeLoad = useCallback(() => setLoading(false), []);

  const version = state?.shoal.version;
  useEffect(() => {
    if (version && !firstVersion) setFirstVersion(version);
  }, [version]);
  const title = state?.models[0] ? `${state.models[0].model} · shoal` : "shoal";
  useEffect(() => {
    document.title = title;
  }, [title]);

  const onKey = (error) => {
    if (error instanceof KeyNeeded) setContact("key");
  };
  async function unload(name) {
    if (!window.confirm(`Unload ${name}? Answers that run end with an error.`)) return;
    try {
      await ask("/shoal/v1/unload", { model: name });
      setSaid("");
    } catch (error) {
      onKey(error);
      setSaid(error.message);
    }
  }

  if (contact === "key") {
    return html`<${KeyForm}
      onDone=${() => {
        setContact("first");
        reconnect();
      }}
    />`;
  }
  const onLoad = () => setLoading(true);
  const talker = state?.models.find((model) => model.model === chosen) ?? state?.models[0] ?? null;
  return html`
    <a class="skip" href="#main">Skip to the shoal</a>
    <${Head} state=${state} contact=${state ? contact : "live"} theme=${theme} onTheme=${nextTheme} onLoad=${onLoad} />
    ${state && contact === "lost" &&
    html`<p class="banner" role="alert">
      The coordinator does not answer. What is shown is old. Trying again…
    </p>`}
    ${firstVersion && version !== firstVersion &&
    html`<p class="banner">
      The coordinator now runs shoal ${version}.
      <button type="button" class="link-button" onClick=${() => window.location.reload()}>Reload the page</button>
    </p>`}
    ${said && html`<p class="banner" role="alert">${said}</p>`}
    <${Views} view=${view} setView=${setView} />
    <main id="main" class=${`layout view-${view}${contact === "lost" ? " stale" : ""}`} tabindex="-1">
      ${state
        ? html`
            <div class="column column-shoal">
              <${Shoal} state=${state} nowS=${nowS} onLoad=${onLoad} onUnload=${unload} />
            </div>
            <div class="column column-chat">
              <${Choice} models=${state.models} chosen=${talker} onChoose=${setChosen} />
              <${Chat} model=${talker} view=${view} onKey=${onKey} />
            </div>
          `
        : html`<p class="waiting" role="status">${contact === "first" ? "Asking the coordinator…" : "The coordinator does not answer."}</p>`}
    </main>
    ${state &&
    html`<footer class="foot quiet small">
      cluster ${state.shoal.cluster} · shoal ${state.shoal.version} · agents join at port ${state.shoal.control_port}
    </footer>`}
    ${isLoading && state && html`<${LoadDialog} state=${state} onClose=${closeLoad} onKey=${onKey} />`}
  `;
}

render(html`<${App} />`, document.getElementById("app"));
