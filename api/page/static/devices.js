// The devices of the shoal, and the line that joins another one.
import { useEffect, useState } from "./vendor/hooks.js";
import { ask } from "./api.js";
import { copyText } from "./clipboard.js";
import { bytes, duration, plural } from "./format.js";
import { html } from "./html.js";

const COOL = 20;
/** Most boards slow down at about this temperature. */
const HOT = 80;

function Meter({ label, value, most, text }) {
  const share = most ? Math.min(1, Math.max(0, value / most)) : 0;
  return html`<div class="meter">
    <span class="meter-label">${label}</span>
    <span class="meter-text">${text}</span>
    <span class="meter-track" aria-hidden="true">
      <span
        class=${share > 0.9 ? "meter-fill meter-full" : "meter-fill"}
        style=${{ width: `${100 * share}%` }}
      ></span>
    </span>
  </div>`;
}

function Unmeasured({ label }) {
  return html`<div class="meter">
    <span class="meter-label">${label}</span>
    <span class="meter-text unmeasured">not measured</span>
  </div>`;
}

function Device({ device, stageBytes, nowS, version }) {
  const isHere = device.state === "here";
  const taken = device.memory_total_bytes - device.memory_available_bytes;
  return html`<li class=${isHere ? "device" : "device device-lost"}>
    <div class="device-head">
      <span class="name" title=${device.name}>${device.name}</span>
      <span class=${isHere ? "state state-here" : "state state-lost"}>
        ${isHere ? "here" : "lost"} ${duration(nowS - device.since_s)}${isHere ? "" : " ago"}
      </span>
    </div>
    <p class="detail" title=${device.machine}>
      ${device.processor || device.machine}<span class="dot">·</span>${plural(device.threads, "thread")}
    </p>
    <p class="detail">
      ${device.backend} ${device.backend_version}<span class="dot">·</span
      ><span class=${device.version === version ? "" : "differs"}>shoal ${device.version}</span>
    </p>
    ${isHere
      ? html`
          <${Meter}
            label="memory"
            value=${taken}
            most=${device.memory_total_bytes}
            text=${`${bytes(device.memory_available_bytes)} free of ${bytes(device.memory_total_bytes)}`}
          />
          <${Meter}
            label="stage"
            value=${stageBytes}
            most=${device.memory_limit_bytes}
            text=${stageBytes
              ? `${bytes(stageBytes)} of ${bytes(device.memory_limit_bytes)}`
              : `none, may take ${bytes(device.memory_limit_bytes)}`}
          />
          ${device.load === null
            ? html`<${Unmeasured} label="load" />`
            : html`<${Meter}
                label="load"
                value=${device.load}
                most=${1}
                text=${`${Math.round(100 * device.load)} % of ${plural(device.cores, "core")}`}
              />`}
          ${device.celsius === null
            ? html`<${Unmeasured} label="heat" />`
            : html`<${Meter}
                label="heat"
                value=${device.celsius - COOL}
                most=${HOT - COOL}
                text=${`${device.celsius} °C`}
              />`}
        `
      : html`<p class="reason">${device.reason}</p>`}
    ${device.noise && html`<p class="noise" title=${device.noise}>measured while others computed</p>`}
  </li>`;
}

/** Bytes of loaded stages by device. */
function stageBytesOf(models) {
  const taken = new Map();
  for (const model of models) {
    for (const stage of model.stages ?? []) {
      for (const part of stage.members.length ? stage.members : [stage]) {
        taken.set(part.device, (taken.get(part.device) ?? 0) + part.memory_bytes);
      }
    }
  }
  return taken;
}

function Failures({ links }) {
  const failed = links.filter((link) => link.failure);
  if (!failed.length) return null;
  return html`<ul class="failures">
    ${failed.map(
      (link) =>
        html`<li key=${`${link.source} ${link.target}`}>
          No link from ${link.source} to ${link.target}: ${link.failure}
        </li>`,
    )}
  </ul>`;
}

export function Devices({ state, nowS }) {
  const here = state.devices.filter((device) => device.state === "here");
  const taken = stageBytesOf(state.models);
  const [isJoining, setJoining] = useState(false);
  const isOpen = isJoining || !here.length;
  return html`<section class="card" aria-labelledby="devices-title">
    <header class="card-head">
      <h2 id="devices-title">Devices <span class="count">${here.length}</span></h2>
      ${here.length > 0 &&
      html`<button
        type="button"
        class="quiet-button"
        aria-expanded=${isOpen}
        onClick=${() => setJoining(!isJoining)}
      >
        ${isJoining ? "Close" : "Add a device"}
      </button>`}
    </header>
    ${isOpen && html`<${Join} shoal=${state.shoal} isFirst=${!state.devices.length} />`}
    <ul class="devices">
      ${state.devices.map(
        (device) =>
          html`<${Device}
            key=${device.name}
            device=${device}
            stageBytes=${taken.get(device.name) ?? 0}
            nowS=${nowS}
            version=${state.shoal.version}
          />`,
      )}
    </ul>
    <${Failures} links=${state.links} />
  </section>`;
}

/** The command that joins a device. It asks for the token, so that none lands in a history. */
function joiningLine(shoal, hosts) {
  const { hostname } = window.location;
  const isLocal = hostname === "localhost" || hostname.startsWith("127.") || hostname === "[::1]";
  const host = isLocal ? (hosts[0] ?? "COORDINATOR") : hostname;
  const cluster = shoal.cluster === "shoal" ? "" : ` --cluster ${shoal.cluster}`;
  const asks = shoal.needs_token ? " --token-file -" : " --insecure";
  return `shoal agent --coordinator ${host}:${shoal.control_port}${cluster}${asks}`;
}

const UNTOLD =
  "No token for this page: run `shoal token create` where the coordinator runs. The page gets one " +
  "with an API key, or if the coordinator's own user opens it on the same machine.";

function CopiedLine({ text, label, onSaid }) {
  async function copy() {
    try {
      await copyText(text);
      onSaid("Copied.");
    } catch (error) {
      onSaid(`Not copied (${error.message}): select the line and copy it.`);
    }
  }
  return html`<div class="line">
    <code tabindex="0" aria-label=${label}>${text}</code>
    <div class="line-buttons"><button type="button" onClick=${copy}>Copy</button></div>
  </div>`;
}

function Join({ shoal, isFirst }) {
  const [hosts, setHosts] = useState([]);
  const [token, setToken] = useState("");
  const [said, setSaid] = useState("");

  // The addresses are no secret. A token is made only when somebody asks for it.
  useEffect(() => {
    ask("/shoal/v1/join", {}).then(
      (found) => setHosts(found.hosts),
      () => {},
    );
  }, []);

  async function make() {
    try {
      const found = await ask("/shoal/v1/join", { token: true });
      setToken(found.token ?? "");
      setSaid(found.token ? "" : UNTOLD);
    } catch (error) {
      setSaid(error.message);
    }
  }
  return html`<div class="join">
    <p>${isFirst ? "No device has joined yet. " : ""}On each device, install shoal and run:</p>
    <${CopiedLine} text=${joiningLine(shoal, hosts)} label="Joining line" onSaid=${setSaid} />
    ${shoal.needs_token &&
    html`<p>It asks for a token, which lets one device join within 24 hours.</p>
      ${token
        ? html`<${CopiedLine} text=${token} label="Token" onSaid=${setSaid} />`
        : html`<button type="button" class="quiet-button" onClick=${make}>Make a token</button>`}`}
    <p class="quiet small" role="status">
      ${said ||
      "Where multicast works, the address may be left out. Every device of one shoal runs the same version."}
    </p>
  </div>`;
}
