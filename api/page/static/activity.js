// What goes on: requests in flight, and the coordinator's events.
import { clock, duration, plural, rate, took } from "./format.js";
import { html } from "./html.js";

const STATES = {
  waiting: "waiting",
  prompt: "reading the prompt",
  answering: "answering",
};

function Request({ request, several, nowS }) {
  const isOver = request.state === "ended";
  const outcome = request.error
    ? "failed"
    : request.status === 499
      ? "client left"
      : request.status >= 400
        ? `refused (${request.status})`
        : "done";
  const speed = request.token_s ? `${rate(1 / request.token_s)} tokens/s` : "";
  const first = request.first_token_s !== null ? `first token ${took(request.first_token_s)}` : "";
  const cached = request.cached_tokens ? `${request.cached_tokens} cached` : "";
  return html`<li class=${isOver ? "request over" : "request"}>
    <span class="request-head">
      <span class=${`state state-${isOver ? outcome.split(" ")[0] : request.state}`}>
        ${isOver ? outcome : STATES[request.state]}
      </span>
      <span class="name" title=${request.id}>${request.key || request.client || "client"}</span>
      <span class="path">${request.path.replace("/v1/", "")}</span>
      <time class="quiet">${isOver ? clock(request.time_s) : duration(nowS - request.time_s)}</time>
    </span>
    <span class="detail">
      ${[
        several && request.model,
        plural(request.prompt_tokens, "prompt token"),
        cached,
        plural(request.answer_tokens, "token"),
        first,
        speed,
      ]
        .filter(Boolean)
        .join(" · ")}
    </span>
    ${request.error && html`<span class="reason">${request.error}</span>`}
  </li>`;
}

export function RequestsCard({ requests, nowS }) {
  const running = requests.filter((request) => request.state !== "ended");
  const over = requests.filter((request) => request.state === "ended");
  const several = new Set(requests.map((request) => request.model).filter(Boolean)).size > 1;
  return html`<section class="card" aria-labelledby="requests-title">
    <header class="card-head">
      <h2 id="requests-title">Requests <span class="count">${running.length}</span></h2>
    </header>
    ${!requests.length && html`<p class="quiet">Nobody has asked anything yet.</p>`}
    <ul class="rows">
      ${[...running, ...over].map(
        (request, index) =>
          html`<${Request} key=${`${request.id} ${index}`} request=${request} several=${several} nowS=${nowS} />`,
      )}
    </ul>
  </section>`;
}

const BAD = new Set(["left", "lost", "link failed", "load failed", "broken", "damaged", "not placed"]);
const GOOD = new Set(["joined", "served", "adopted", "replaced", "link works", "as planned"]);

export function EventsCard({ events }) {
  return html`<section class="card" aria-labelledby="events-title">
    <header class="card-head"><h2 id="events-title">Events</h2></header>
    ${!events.length && html`<p class="quiet">Nothing has happened yet.</p>`}
    <ol class="rows events" reversed tabindex="0" aria-label="Events, newest first">
      ${[...events].reverse().map(
        (event) =>
          html`<li key=${event.number}>
            <time>${clock(event.time_s)}</time>
            <span class=${`kind ${BAD.has(event.kind) ? "kind-bad" : GOOD.has(event.kind) ? "kind-good" : ""}`}
              >${event.kind}</span
            >
            <span class="event-text"><b>${event.subject}</b> ${event.text}</span>
          </li>`,
      )}
    </ol>
  </section>`;
}
