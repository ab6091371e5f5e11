// Figures and times as people read them.

const UNITS = ["B", "KB", "MB", "GB", "TB"];

/** 1536000 -> "1.5 MB" */
export function bytes(value) {
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value >= 99.5 || unit === 0 ? Math.round(value) : Number(value.toPrecision(2))}\u00a0${UNITS[unit]}`;
}

/** Seconds as milliseconds with three digits: 0.01234 -> "12.3" */
export function ms(seconds) {
  const value = seconds * 1e3;
  if (value >= 99.95) return Math.round(value).toLocaleString("en");
  if (value >= 9.995) return value.toFixed(1);
  return value.toFixed(2);
}

/** A time with its unit: "340 ms", "6.2 s" */
export function took(seconds) {
  if (seconds < 0.9995) return `${ms(seconds)}\u00a0ms`;
  return `${seconds >= 99.95 ? Math.round(seconds) : seconds.toFixed(1)}\u00a0s`;
}

/** A rate with about three digits: 23.456 -> "23.5" */
export function rate(value) {
  return value >= 99.95 ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}

/** 3725 -> "1 h 2 min" */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** A time of day, such as "14:03:27". */
export function clock(timeS) {
  return new Date(timeS * 1e3).toLocaleTimeString("en-GB");
}

/** [8, 4, 4, 4, 8] -> "8 4×3 8", as the command line has it */
export function bitRuns(bits) {
  const runs = [];
  for (const width of bits) {
    const last = runs[runs.length - 1];
    if (last && last[0] === width) last[1] += 1;
    else runs.push([width, 1]);
  }
  return runs.map(([width, count]) => (count > 1 ? `${width}×${count}` : `${width}`)).join(" ");
}

/** The names of a stage's blocks: "embedding – layer 3" */
export function blockRange(names) {
  const ends = names.length > 1 ? [names[0], names[names.length - 1]] : names;
  return ends.map((name) => name.replaceAll(" ", "\u00a0")).join(" – ");
}

export function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}
