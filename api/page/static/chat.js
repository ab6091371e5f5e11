// A chat with the loaded model, over the same API as every other client.
import { useEffect, useLayoutEffect, useRef, useState } from "./vendor/hooks.js";
import { Refused, send, serverEvents } from "./api.js";
import { plural, rate, took } from "./format.js";
import { html } from "./html.js";
import { Markdown } from "./markdown.js";

const KEPT = "shoal.chat";
const SETTINGS = "shoal.chat.settings";

/** Pieces that come within this time are shown together. */
const REDRAW_MS = 40;

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, hint: "0 takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.05, hint: "1 draws from all tokens" },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 1_000_000, step: 1, hint: "ends the answer" },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 31, step: 1, hint: "the same seed draws the same" },
];

function kept(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function keep(name, value) {
  try {
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    // The browser keeps nothing, or no more: the chat goes on without.
  }
}

/** The request for the next answer. Settings that are empty are left to the model. */
function requestFor(model, messages, settings) {
  const said = messages
    .filter((message) => message.role === "user" || message.content)
    .map(({ role, content }) => ({ role, content }));
  const system = settings.system?.trim();
  const numbers = FIELDS.map(({ name }) => [name, settings[name]]).filter(
    ([, value]) => value !== "" && value !== undefined && value !== null,
  );
  return {
    model,
    messages: system ? [{ role: "system", content: system }, ...said] : said,
    stream: true,
    return_token_ids: true,
    ...Object.fromEntries(numbers.map(([name, value]) => [name, Number(value)])),
  };
}

/** The code of a refusal: the model's chat template has no place for some message. */
const NO_PLACE = "template_has_no_place";

/** Ask with the whole conversation. A model that takes no earlier messages gets the last one alone. */
async function converse(model, history, settings, signal, change) {
  try {
    await answer(requestFor(model, history, settings), signal, change);
  } catch (error) {
    if (error.code !== NO_PLACE || history.length < 2) throw error;
    change((message) => ({ ...message, isAlone: true }));
    await answer(requestFor(model, history.slice(-1), settings), signal, change);
  }
}

/** Run one request. `change` gets functions that change the answer's message. */
async function answer(body, signal, change) {
  const beganMs = performance.now();
  const response = await send("/v1/chat/completions", { body, signal, accept: "text/event-stream" });
  let waiting = [];
  let isPlanned = false;
  const flush = () => {
    isPlanned = false;
    const steps = waiting;
    waiting = [];
    change((message) => steps.reduce((so, step) => step(so), message));
  };
  const later = (step) => {
    waiting.push(step);
    if (!isPlanned) {
      isPlanned = true;
      setTimeout(flush, REDRAW_MS); // Not with the next frame: a hidden page draws none.
    }
  };
  let isComplete = false;
  for await (const event of serverEvents(response)) {
    if (event.comment !== undefined) {
      later((message) => ({ ...message, notice: event.comment }));
      continue;
    }
    if (event.data === "[DONE]") break;
    const part = JSON.parse(event.data);
    if (part.error) throw new Refused(part.error);
    for (const choice of part.choices ?? []) {
      const text = choice.delta?.content ?? "";
      const thought = choice.delta?.reasoning_content ?? "";
      if (text || thought) {
        const nowMs = performance.now();
        later((message) => ({
          ...message,
          notice: "",
          content: message.content + text,
          reasoning: (message.reasoning ?? "") + thought,
          firstS: message.firstS ?? (nowMs - beganMs) / 1e3,
        }));
      }
      if (choice.finish_reason) {
        isComplete = true;
        const tokens = part.shoal?.tokens?.length;
        const perS = part.shoal?.decode_tokens_per_s;
        later((message) => ({ ...message, finish: choice.finish_reason, tokens, perS }));
      }
    }
  }
  flush();
  if (!isComplete) throw new Error("the answer ended before it was complete");
}

function Figures({ message, onAgain }) {
  const parts = [
    message.tokens !== undefined && plural(message.tokens, "token"),
    message.firstS !== undefined && `first after ${took(message.firstS)}`,
    message.perS && `${rate(message.perS)} tokens/s`,
    message.finish === "length" && "cut: no room for more",
    message.isStopped && "stopped",
    message.isAlone && "asked alone, since its template takes no earlier messages",
  ].filter(Boolean);
  return html`<p class="figures">
    <span>${parts.join(" · ")}</span>
    ${onAgain && html`<button type="button" class="link-button" onClick=${onAgain}>Answer again</button>`}
  </p>`;
}

function Message({ message, isWriting, onAgain }) {
  if (message.role === "user") {
    return html`<li class="message user"><p class="plain">${message.content}</p></li>`;
  }
  const isEmpty = !message.content && !message.reasoning;
  return html`<li class="message assistant">
    ${message.reasoning &&
    html`<details class="thought">
      <summary>${message.content || !isWriting ? "Thought" : "Thinking…"}</summary>
      <p class="plain">${message.reasoning}</p>
    </details>`}
    ${message.content && html`<${Markdown} text=${message.content} />`}
    ${isWriting &&
    html`<p class="writing"><span class="pulse" aria-hidden="true"></span>${message.notice || (isEmpty ? "waiting for the first token" : "")}</p>`}
    ${!isWriting && isEmpty && !message.error && html`<p class="quiet">${message.isStopped ? "Stopped before the first token." : "The model's answer is empty."}</p>`}
    ${message.error && html`<p class="reason" role="alert">${message.error}</p>`}
    ${!isWriting && html`<${Figures} message=${message} onAgain=${onAgain} />`}
  </li>`;
}

function Settings({ settings, defaults, onChange }) {
  return html`<div class="settings">
    <label class="field wide">
      <span>System prompt</span>
      <textarea
        rows="2"
        value=${settings.system ?? ""}
        onInput=${(event) => onChange({ ...settings, system: event.target.value })}
      ></textarea>
    </label>
    ${FIELDS.map(
      ({ name, label, hint, ...limits }) =>
        html`<label key=${name} class="field">
          <span>${label}</span>
          <input
            type="number"
            ...${limits}
            placeholder=${defaults[name] ?? "model's"}
            title=${hint}
            value=${settings[name] ?? ""}
            onInput=${(event) => onChange({ ...settings, [name]: event.target.value })}
          />
        </label>`,
    )}
  </div>`;
}

function announced(message) {
  if (!message || message.role !== "assistant") return "";
  if (message.error) return "";
  return message.content || message.reasoning || "The answer is empty.";
}

export function Chat({ model, view, onKey }) {
  const [messages, setMessages] = useState(() => kept(KEPT, []));
  const [settings, setSettings] = useState(() => kept(SETTINGS, {}));
  const [draft, setDraft] = useState("");
  const [running, setRunning] = useState(null);
  const [areSettingsOpen, openSettings] = useState(false);
  const list = useRef(null);
  const box = useRef(null);
  const sticks = useRef(true);

  useEffect(() => keep(SETTINGS, settings), [settings]);
  useEffect(() => {
    if (!running) keep(KEPT, messages);
  }, [messages, running]);
  useLayoutEffect(() => {
    if (sticks.current && list.current) list.current.scrollTop = list.current.scrollHeight;
  }, [messages, view, running]);
  useLayoutEffect(() => {
    const area = box.current;
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight + 2, 180)}px`;
  }, [draft]);

  const changeLast = (step) => setMessages((all) => [...all.slice(0, -1), step(all[all.length - 1])]);

  async function ask(history) {
    const control = new AbortController();
    sticks.current = true;
    setMessages([...history, { role: "assistant", content: "" }]);
    setRunning(control);
    try {
      await converse(model.model, history, settings, control.signal, changeLast);
    } catch (error) {
      if (control.signal.aborted) changeLast((message) => ({ ...message, isStopped: true }));
      else {
        onKey(error);
        changeLast((message) => ({ ...message, error: error.message }));
      }
    } finally {
      setRunning(null);
      box.current?.focus({ preventScroll: true });
    }
  }

  function submit(event) {
    event?.preventDefault();
    const content = draft.trim();
    if (running || !content || !model) return;
    setDraft("");
    ask([...messages, { role: "user", content }]);
  }

  function again() {
    const last = messages.findLastIndex((message) => message.role === "user");
    if (last >= 0) ask(messages.slice(0, last + 1));
  }

  function pressed(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    else if (event.key === "Escape" && running) running.abort();
  }

  const isReady = Boolean(model) && model.state !== "broken";
  const placeholder = !model
    ? "Load a model first"
    : model.state === "ready"
      ? `Ask ${model.model}`
      : `${model.model} is ${model.state}: the answer waits for it`;
  return html`<section class="card chat" aria-labelledby="chat-title">
    <header class="card-head">
      <h2 id="chat-title">Chat</h2>
      <div class="head-buttons">
        <button
          type="button"
          class="quiet-button"
          aria-expanded=${areSettingsOpen}
          onClick=${() => openSettings(!areSettingsOpen)}
        >
          Settings
        </button>
        <button
          type="button"
          class="quiet-button"
          disabled=${!messages.length || Boolean(running)}
          onClick=${() => {
            setMessages([]);
            box.current?.focus();
          }}
        >
          Clear
        </button>
      </div>
    </header>
    ${areSettingsOpen &&
    html`<${Settings}
      settings=${settings}
      defaults=${model?.sampling_defaults ?? {}}
      onChange=${setSettings}
    />`}
    <ol
      class="messages"
      ref=${list}
      tabindex="0"
      aria-label="Conversation"
      onScroll=${({ target }) => {
        sticks.current = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
      }}
    >
      ${!messages.length &&
      html`<li class="empty">
        ${model ? "Nothing has been said yet." : "No model is loaded."}
      </li>`}
      ${messages.map(
        (message, index) =>
          html`<${Message}
            key=${index}
            message=${message}
            isWriting=${Boolean(running) && index === messages.length - 1}
            onAgain=${!running && isReady && index === messages.length - 1 ? again : null}
          />`,
      )}
    </ol>
    <p class="hidden" role="status" aria-live="polite">
      ${running ? "The model is answering." : announced(messages[messages.length - 1])}
    </p>
    <form class="composer" onSubmit=${submit}>
      <textarea
        ref=${box}
        rows="1"
        aria-label="Message"
        placeholder=${placeholder}
        disabled=${!isReady}
        value=${draft}
        onInput=${(event) => setDraft(event.target.value)}
        onKeyDown=${pressed}
      ></textarea>
      ${running
        ? html`<button type="button" class="stop" onClick=${() => running.abort()}>Stop</button>`
        : html`<button type="submit" class="main-button" disabled=${!isReady || !draft.trim()}>
            Send
          </button>`}
    </form>
    <p class="composer-hint quiet small">Enter sends, Shift+Enter begins a line, Esc stops.</p>
  </section>`;
}
