// The tagged template that makes elements. All text in it becomes text nodes, never markup.
import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);
