// What the page shows, and the small things that all parts need. Text of runs reaches the page as text alone.
const sweep = JSON.parse(document.getElementById("data").textContent);
const SEED = sweep.settings.indexOf("seed");
const finished = sweep.runs.filter((run) => run.state === "finished" && run.dev !== null);

const shown = (value) => (value === null ? "null" : typeof value === "string" ? value : JSON.stringify(value));
const fixed = (value) => (value === null ? "" : value.toFixed(2));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// Sample standard deviation; null for fewer than two values.
function deviation(values) {
  if (values.length < 2) return null;
  const middle = mean(values);
  return Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
}

function duration(seconds) {
  if (seconds === null) return "";
  const whole = Math.round(seconds), two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
}

// Numbers by size, then texts by the alphabet; what is absent comes last.
function compare(first, second) {
  const kind = (value) => (value === null ? 2 : typeof value === "number" ? 0 : 1);
  if (kind(first) !== kind(second)) return kind(first) - kind(second);
  return typeof first === "number" ? first - second : shown(first).localeCompare(shown(second));
}

// The distinct values of a setting over some runs, in order.
function levels(runs, setting) {
  const found = new Map(runs.map((run) => [shown(run.values[setting]), run.values[setting]]));
  return [...found.values()].sort(compare).map(shown);
}

function grouped(items, keyOf) {
  const groups = new Map();
  for (const item of items) {
    const key = keyOf(item);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(item);
  }
  return groups;
}

function element(tag, text = "", properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text) made.textContent = text;
  return made;
}

// A labelled menu; `choices` are [value, text].
function menu(name, choices, chosen, onChange) {
  const label = element("label", `${name} `), select = element("select");
  for (const [value, text] of choices) select.append(element("option", text, {value, selected: value === chosen}));
  select.addEventListener("change", () => onChange(select.value));
  label.append(select);
  return label;
}
