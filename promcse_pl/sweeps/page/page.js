// Filters and sorts the table of runs and draws the charts. Names and values of runs are inserted as text only.
"use strict";
const {settings, levels, runs, comparable} = JSON.parse(document.getElementById("data").textContent);
const SEED = settings.indexOf("seed");
const CURVES = ["#4477aa", "#ee6677", "#228833", "#b8860b", "#33a1c9", "#aa3377", "#808080", "#e07020"];
const DASHES = ["solid", "dash", "dot"], BORDERS = ["solid", "dashed", "dotted"];
// Light enough for black cell labels at a contrast of 4.5:1 or more.
const CELLS = [[0, "#ffffd9"], [0.25, "#c7e9b4"], [0.5, "#7fcdbb"], [0.75, "#41b6c4"], [1, "#1d91c0"]];
const ticked = new Set();

const byId = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const deviation = (values) => (values.length < 2 ? null
  : Math.sqrt(values.reduce((sum, value) => sum + (value - mean(values)) ** 2, 0) / (values.length - 1)));
// Plotly renders some HTML tags in labels.
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, length = 24) => escaped(text.length > length ? `${text.slice(0, length - 1)}…` : text);
const levelsOf = (setting, shown) => levels[setting].filter((level) => shown.some((run) => run.values[setting] === level));

// ---- table
const rows = all("#runs tbody tr").map((tr) => ({tr, runs: tr.dataset.runs.split(" ").map((index) => runs[index])}));
const heads = all("#runs th");
for (const {tr, runs: [run]} of rows.filter((row) => row.tr.className === "single")) {
  run.text = heads.map((head, n) => `${head.textContent}=${tr.cells[n].textContent}`).join("\n").toLowerCase();
}

function matchingRuns() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const menus = all("select.equals");
  return runs.filter((run) => words.every((word) => run.text.includes(word)) && menus.every((menu, n) => (
    menu.selectedIndex === 0 || menu.value === [...run.values, run.state][n])));
}

function sortRows(column, descending) {
  const order = (first, second) => {
    const [a, b] = [first, second].map(({tr}) => tr.cells[column].dataset.value);
    if (a === "" || b === "") return (a === "") - (b === "");  // absent values are last in both orders
    return (descending ? -1 : 1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  };
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
  document.querySelector("#runs tbody").append(...rows.sort(order).map(({tr}) => tr));
}

function showTicks() {
  for (const {tr, runs: members} of rows) {
    const box = tr.querySelector("input"), count = members.filter((run) => ticked.has(run)).length;
    box.checked = count === members.length;
    box.indeterminate = count > 0 && !box.checked;
  }
}

let timer;
function update() {
  const matching = matchingRuns(), matches = new Set(matching);
  const mode = byId("single").checked ? "single" : "grouped";
  const inMode = rows.filter(({tr}) => tr.className === mode);
  rows.forEach((row) => { row.tr.hidden = row.tr.className !== mode || !row.runs.some((run) => matches.has(run)); });
  byId("count").textContent = `${inMode.filter(({tr}) => !tr.hidden).length} of ${inMode.length} rows`;
  clearTimeout(timer);  // draw once after a burst of keys
  timer = setTimeout(() => drawSettings(matching.filter((run) => run.state === "finished" && run.dev !== null)), 100);
}

// ---- charts
function plot(element, traces, {xaxis, yaxis, ...layout}) {
  const axis = {automargin: true, gridcolor: color("--line"), zeroline: false, fixedrange: true};
  Plotly.react(element, traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: color("--text"), size: 12},
    margin: {l: 40, r: 16, t: 30, b: 40}, showlegend: false, hovermode: "closest", xaxis: {...axis, ...xaxis}, yaxis: {...axis, ...yaxis}, ...layout,
  }, {responsive: true, displayModeBar: false});
}

function levelAxis(setting, names) {
  return {title: {text: short(settings[setting], 60)}, tickvals: [...names.keys()], ticktext: names.map((name) => short(name)),
    range: [-0.5, names.length - 0.5], showgrid: false};
}

// One plot per item in the grid of a section; returns the elements.
function panels(section, count) {
  const grid = document.querySelector(`#${section} .grid`);
  while (grid.children.length > count) { Plotly.purge(grid.lastChild); grid.lastChild.remove(); }
  while (grid.children.length < count) grid.append(Object.assign(document.createElement("div"), {className: "plot"}));
  return [...grid.children];
}

function drawSettings(shown) {
  const compared = [...settings.keys()].filter((setting) => setting !== SEED);
  const section = (id, isPossible, draw) => {
    byId(id).hidden = !shown.length || !isPossible;
    if (!byId(id).hidden) draw();
  };
  section("heat", comparable && compared.length > 1, () => drawHeat(shown));
  section("effects", comparable && compared.length, () => panels("effects", compared.length).forEach((panel, n) => drawEffect(panel, compared[n], shown)));
  section("parallel", settings.length, () => drawParallel(shown));
}

function drawHeat(shown) {
  const [x, y] = ["across", "up"].map((id) => Number(byId(id).value));
  const columns = levelsOf(x, shown), lines = levelsOf(y, shown);
  const cells = lines.map((line) => columns.map((column) => shown.filter((run) => run.values[x] === column && run.values[y] === line)));
  const means = cells.map((line) => line.map((cell) => mean(cell.map((run) => run.dev))));
  plot(document.querySelector("#heat .plot"), [{
    type: "heatmap", z: means, text: means.map((line) => line.map((value) => value?.toFixed(2) ?? "")),
    customdata: cells.map((line) => line.map((cell) => cell.length)), hoverongaps: false,
    texttemplate: columns.length <= 12 && lines.length <= 20 ? "%{text}" : "", textfont: {color: "#000000"},
    hovertemplate: "%{text}, n = %{customdata}<extra></extra>", colorscale: CELLS, xgap: 2, ygap: 2,
    colorbar: {thickness: 12, outlinewidth: 0, title: {text: "dev"}},
  }], {xaxis: levelAxis(x, columns), yaxis: levelAxis(y, lines)});
}

function drawEffect(panel, setting, shown) {
  const names = levelsOf(setting, shown);
  const seedMeans = names.map((name) => {
    const bySeed = Map.groupBy(shown.filter((run) => run.values[setting] === name), (run) => run.values[SEED]);
    return [...bySeed.values()].map((group) => mean(group.map((run) => run.dev)));
  });
  plot(panel, [
    {mode: "markers", marker: {color: color("--faint"), size: 5, opacity: 0.6}, x: shown.map((run) => names.indexOf(run.values[setting])),
      y: shown.map((run) => run.dev), text: shown.map((run) => escaped(run.name)), hovertemplate: "run %{text}: %{y:.2f}<extra></extra>"},
    {mode: "lines+markers", line: {color: color("--accent")}, marker: {size: 8}, x: [...names.keys()], y: seedMeans.map(mean),
      error_y: {array: seedMeans.map(deviation), thickness: 1.5}, hovertemplate: "mean %{y:.2f}<extra></extra>"},
  ], {xaxis: levelAxis(setting, names), yaxis: {title: {text: "dev"}}, margin: {l: 40, r: 16, t: 12, b: 40}});
}

// Drawn as scatter lines: plotly's parallel coordinates need WebGL.
function drawParallel(shown) {
  const axes = settings.map((_, setting) => levelsOf(setting, shown)), end = settings.length;
  const scores = shown.map((run) => run.dev), low = Math.min(...scores), high = Math.max(...scores);
  const height = (value, lowest, highest) => (highest > lowest ? (value - lowest) / (highest - lowest) : 0.5);
  const label = (x, y, text) => ({x, y, text, showarrow: false, xanchor: "left", xshift: 3, bgcolor: color("--ground")});
  const labels = axes.flatMap((names, x) => {
    const every = Math.ceil(names.length / 12);
    return names.map((name, n) => (n % every ? [] : label(x, height(n, 0, names.length - 1), short(name, 10)))).flat();
  });
  plot(document.querySelector("#parallel .plot"), [...shown].sort((a, b) => a.dev - b.dev).map((run) => {
    const share = height(run.dev, low, high);
    return {mode: "lines", opacity: 0.25 + 0.75 * share ** 3, line: {color: color("--accent"), width: 1 + 2 * share ** 3},
      x: [...axes.keys(), end], y: [...axes.map((names, n) => height(names.indexOf(run.values[n]), 0, names.length - 1)), share],
      hovertemplate: `run ${escaped(run.name)}: ${run.dev.toFixed(2)}<extra></extra>`};
  }), {
    annotations: [...labels, ...[low, high].map((score) => label(end, height(score, low, high), score.toFixed(2)))],
    margin: {l: 30, r: 45, t: 40, b: 20}, yaxis: {visible: false, range: [-0.06, 1.06]},
    xaxis: {side: "top", range: [-0.05, end + 0.05], gridcolor: color("--faint"), tickvals: [...axes.keys(), end],
      ticktext: [...settings.map((name) => short(name, 40).replace(".", ".<br>")), "dev"]},
  });
}

function drawTraining() {
  const drawn = runs.filter((run) => ticked.has(run));
  const lines = drawn.map((_, n) => ({color: CURVES[n % CURVES.length], dash: DASHES[Math.floor(n / CURVES.length) % DASHES.length], width: 1.5}));
  document.querySelector("#training .legend").replaceChildren(...drawn.map((run, n) => {
    const item = document.createElement("li"), swatch = item.appendChild(document.createElement("i"));
    swatch.style.borderTop = `3px ${BORDERS[DASHES.indexOf(lines[n].dash)]} ${lines[n].color}`;
    item.append(`${run.name}: ${settings.map((name, setting) => `${name}=${run.values[setting]}`).join(" ")}`);
    return item;
  }));
  const metrics = [...new Set(drawn.flatMap((run) => Object.keys(run.curves)))];
  panels("training", metrics.length).forEach((panel, at) => plot(panel, drawn.flatMap((run, n) => {
    const [x, y] = run.curves[metrics[at]] ?? [[], []];
    const few = y.filter((value) => value !== null).length <= 30;  // a line through one point is invisible
    return {x, y, mode: few ? "lines+markers" : "lines", line: lines[n],
      hovertemplate: `run ${escaped(run.name)}, step %{x}: %{y:.5~g}<extra></extra>`};
  }), {title: {text: short(metrics[at], 60), font: {size: 13}, x: 0.02}, xaxis: {title: {text: "step"}, rangemode: "tozero"}, yaxis: {tickformat: ".4~g"}}));
}

// ---- start
["across", "up"].forEach((id, at) => {
  const choices = [...settings.keys()].filter((setting) => setting !== SEED);
  byId(id).append(...choices.map((setting) => new Option(settings[setting], setting, false, setting === choices[at])));
});
heads.slice(1).forEach((head, n) => head.firstChild.addEventListener("click", () => sortRows(n + 1, head.getAttribute("aria-sort") === "ascending")));
rows.filter(({tr, runs: [run]}) => tr.className === "single" && Object.keys(run.curves).length).slice(0, 4).forEach((row) => ticked.add(row.runs[0]));
rows.forEach(({tr, runs: members}) => tr.querySelector("input").addEventListener("change", (event) => {
  members.forEach((run) => (event.target.checked ? ticked.add(run) : ticked.delete(run)));
  showTicks();
  drawTraining();
}));
all(".menus input, .menus select").forEach((control) => control.addEventListener(control.type === "search" ? "input" : "change", update));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { update(); drawTraining(); });
byId("training").hidden = !runs.some((run) => Object.keys(run.curves).length);
sortRows(1, false);
showTicks();
update();
drawTraining();
