// Requests to the coordinator that served this page.

const KEY = "shoal.key";

/** The coordinator wants an API key, or another one. */
export class KeyNeeded extends Error {}

let key = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";

export function hasKey() {
  return key !== "";
}

export function setKey(value, remember) {
  key = value.trim();
  sessionStorage.setItem(KEY, key);
  if (remember) localStorage.setItem(KEY, key);
  else localStorage.removeItem(KEY);
}

/** The coordinator refuses a request. `code` is its word for the reason, or null. */
export class Refused extends Error {
  constructor({ message, code = null }) {
    super(message);
    this.code = code;
  }
}

/** Send a request. Throws KeyNeeded, or Refused with the coordinator's own words. */
export async function send(path, { body, accept, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (accept) headers.Accept = accept;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
    credentials: "omit",
  });
  if (response.ok) return response;
  let error = { message: `${response.status} ${response.statusText}` };
  try {
    error = { ...error, ...(await response.json()).error };
  } catch {
    // Not the coordinator's own words: a proxy answered.
  }
  throw response.status === 401 ? new KeyNeeded(error.message) : new Refused(error);
}

export async function ask(path, body) {
  return (await send(path, { body })).json();
}

/** Yield the texts of a response that end with `end`. */
async function* pieces(response, end) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      for (let at = rest.indexOf(end); at >= 0; at = rest.indexOf(end)) {
        yield rest.slice(0, at);
        rest = rest.slice(at + end.length);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Yield {data} or {comment} for each server-sent event. */
export async function* serverEvents(response) {
  for await (const text of pieces(response, "\n\n")) {
    const data = [];
    for (const line of text.split("\n")) {
      if (line.startsWith("data: ")) data.push(line.slice(6));
      else if (line.startsWith(": ")) yield { comment: line.slice(2) };
    }
    if (data.length) yield { data: data.join("\n") };
  }
}

/** Run a plan or a load. `onStep` gets its progress. Returns its result. */
export async function operate(path, body, onStep, signal) {
  const response = await send(path, { body, signal });
  for await (const line of pieces(response, "\n")) {
    const event = JSON.parse(line);
    if (event.error) throw new Refused(event.error);
    if (event.result) return event.result;
    if (event.step) onStep(event.step);
  }
  throw new Error("the coordinator stopped before it was done");
}

const SILENCE_MS = 10_000;
const LONGEST_PAUSE_MS = 4_000;

/**
 * Follow the state until `signal` aborts, over restarts of the coordinator.
 * `onParts` gets the parts that changed, `onContact` "live", "lost" or "key".
 */
export async function followState(signal, onParts, onContact) {
  let pause = 300;
  while (!signal.aborted) {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    signal.addEventListener("abort", stop);
    let silence = setTimeout(stop, SILENCE_MS);
    try {
      const response = await send("/shoal/v1/state", {
        accept: "text/event-stream",
        signal: attempt.signal,
      });
      for await (const event of serverEvents(response)) {
        clearTimeout(silence);
        silence = setTimeout(stop, SILENCE_MS);
        pause = 300;
        if (event.data) onParts(JSON.parse(event.data));
        onContact("live");
      }
      if (!signal.aborted) onContact("lost");
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof KeyNeeded) {
        onContact("key", error.message);
        return;
      }
      onContact("lost");
    } finally {
      clearTimeout(silence);
      signal.removeEventListener("abort", stop);
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
  }
}
