// The pictures, drawn by plotly as SVG. Each is a function of the data and of what its menus hold.
const AVERAGE = "mean over all";
const COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccaa22", "#66ccee", "#aa3377", "#999999", "#ee8833"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const drawn = [];  // functions that draw everything anew, for a change of light and dark

// Plotly reads a little HTML in labels; what runs are called must stay text.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, most = 28) => plain(text.length > most ? `${text.slice(0, most - 1)}…` : text);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function axis(title, more = {}) {
  return {title: {text: short(title, 60)}, automargin: true, gridcolor: colour("--line"), linecolor: colour("--line"),
    zeroline: false, ...more};
}

// An axis of named levels, one unit apart.
function levelAxis(title, names) {
  return axis(title, {tickvals: names.map((_, place) => place), ticktext: names.map((name) => short(name)),
    range: [-0.5, names.length - 0.5], showgrid: false, tickangle: "auto"});
}

function plot(place, traces, layout) {
  const margin = {l: 40, r: 12, t: 12, b: 40, ...layout.margin};
  return Plotly.react(place, traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: colour("--text"), size: 12},
    hoverlabel: {bgcolor: colour("--panel"), bordercolor: colour("--line"), font: {color: colour("--text")}},
    showlegend: false, dragmode: false, ...layout, margin,
  }, {responsive: true, displayModeBar: false});
}

// Menus for the axes of a picture, and for each other setting a value or the mean over all.
function withMenus(section, axes, draw) {
  const root = document.getElementById(section);
  const settings = sweep.settings.map((_, place) => place).filter((place) => place !== SEED);
  const chosen = {axes: settings.slice(0, axes.length), others: new Map()};
  const update = () => {
    const menus = axes.map((name, at) => menu(
      name, settings.map((place) => [String(place), sweep.settings[place]]), String(chosen.axes[at]), (value) => {
        const other = chosen.axes.indexOf(Number(value));
        if (other >= 0) chosen.axes[other] = chosen.axes[at];  // two axes never show the same: they change places
        chosen.axes[at] = Number(value);
        update();
      }));
    const rest = sweep.settings.map((_, place) => place).filter((place) => !chosen.axes.includes(place));
    for (const place of rest) {
      const names = [AVERAGE, ...levels(finished, place)];
      menus.push(menu(sweep.settings[place], names.map((name, at) => [String(at), name]),
        String(chosen.others.get(place) ?? 0), (value) => { chosen.others.set(place, Number(value)); show(); }));
    }
    root.querySelector(".menus").replaceChildren(...menus);
    show();
  };
  const show = () => {
    const fits = (run) => sweep.settings.every((_, place) => {
      const at = chosen.axes.includes(place) ? 0 : chosen.others.get(place) ?? 0;
      return at === 0 || shown(run.values[place]) === levels(finished, place)[at - 1];
    });
    draw(root.querySelector(".plot"), chosen.axes, finished.filter(fits));
  };
  drawn.push(show);
  update();
}

function drawHeat(place, [x, y], runs) {
  const columnNames = levels(finished, x), rowNames = levels(finished, y);
  const cells = grouped(runs, (run) => `${rowNames.indexOf(shown(run.values[y]))},${columnNames.indexOf(shown(run.values[x]))}`);
  const grid = (valueOf) => rowNames.map((_, row) => columnNames.map((__, column) => valueOf(cells.get(`${row},${column}`))));
  const few = columnNames.length <= 12 && rowNames.length <= 20;
  plot(place, [{
    type: "heatmap", colorscale: "Viridis", xgap: 2, ygap: 2, hoverongaps: false,
    z: grid((of) => (of ? mean(of.map((run) => run.dev)) : null)),
    text: grid((of) => (of ? fixed(mean(of.map((run) => run.dev))) : "")),
    customdata: grid((of) => (of ? `n = ${of.length}` : "")),
    texttemplate: few ? "%{text}" : "", hovertemplate: "%{text}, %{customdata}<extra></extra>",
    colorbar: {thickness: 12, outlinewidth: 0, title: {text: "dev"}},
  }], {xaxis: levelAxis(sweep.settings[x], columnNames), yaxis: levelAxis(sweep.settings[y], rowNames)});
}

// Points are runs; the line is the mean over seeds (of each seed's mean over what the menus leave open), the band +- std.
function drawCurve(place, [x], runs) {
  const names = levels(finished, x);
  const seedOf = (run) => (SEED < 0 ? "" : shown(run.values[SEED]));
  const stations = names.map((name, at) => {
    const here = runs.filter((run) => shown(run.values[x]) === name);
    const perSeed = [...grouped(here, seedOf).values()].map((of) => mean(of.map((run) => run.dev)));
    return {at, n: here.length, seeds: perSeed.length, value: perSeed.length ? mean(perSeed) : null, std: deviation(perSeed)};
  }).filter(({value}) => value !== null);
  const banded = stations.filter(({std}) => std !== null);
  const line = colour("--accent");
  plot(place, [
    {type: "scatter", mode: "lines", hoverinfo: "skip", fill: "toself", fillcolor: `${line}33`, line: {width: 0},
      x: [...banded.map(({at}) => at), ...banded.map(({at}) => at).reverse()],
      y: [...banded.map(({value, std}) => value + std), ...banded.map(({value, std}) => value - std).reverse()]},
    {type: "scatter", mode: "markers", marker: {color: colour("--faint"), size: 5, opacity: 0.5},
      x: runs.map((run) => names.indexOf(shown(run.values[x]))), y: runs.map((run) => run.dev),
      text: runs.map((run) => `run ${plain(run.name)}`), hovertemplate: "%{text}: %{y:.2f}<extra></extra>"},
    {type: "scatter", mode: "lines+markers", line: {color: line, width: 2}, marker: {color: line, size: 8},
      x: stations.map(({at}) => at), y: stations.map(({value}) => value),
      text: stations.map(({value, std, n, seeds}) =>
        `${fixed(value)}${std === null ? "" : ` ± ${fixed(std)} over ${seeds} seeds`}, n = ${n}`),
      hovertemplate: "%{text}<extra></extra>"},
  ], {xaxis: levelAxis(sweep.settings[x], names), yaxis: axis("dev", {tickformat: ".4~g"})});
  place.parentElement.querySelector(".hint").textContent = banded.length
    ? "Points are runs; the line is their mean, the band ± the standard deviation over seeds."
    : "Points are runs; the line is their mean. One seed only: no band.";
}

// Plain SVG lines: plotly's own parallel coordinates need WebGL.
function drawParallel(place) {
  const named = sweep.settings.map((name, setting) => ({name, names: levels(finished, setting), setting}));
  const scores = finished.map((run) => run.dev), low = Math.min(...scores), high = Math.max(...scores);
  const unit = (value, least, most) => (most > least ? (value - least) / (most - least) : 0.5);
  const heightOf = ({names, setting}, run) => unit(names.indexOf(shown(run.values[setting])), 0, names.length - 1);
  const narrow = place.clientWidth < 600;
  const marks = named.flatMap(({names}, at) => {
    const every = Math.ceil(names.length / 12);
    return names.map((name, level) => ({x: at, y: unit(level, 0, names.length - 1), text: short(name, narrow ? 8 : 20), level}))
      .filter(({level}) => level % every === 0 || level === names.length - 1);
  });
  marks.push(...[low, high].map((score) => ({x: named.length, y: unit(score, low, high), text: fixed(score)})));
  const traces = [...finished].sort((a, b) => a.dev - b.dev).map((run) => {
    const share = unit(run.dev, low, high);
    return {type: "scatter", mode: "lines", opacity: 0.35 + 0.65 * share, line: {color: shade(share), width: 1 + 2 * share ** 4},
      x: [...named.keys(), named.length], y: [...named.map((one) => heightOf(one, run)), share],
      name: "", hovertemplate: `run ${plain(run.name)}: ${fixed(run.dev)}<extra></extra>`};
  });
  const label = (x, y, text, more) => ({x, y, text, showarrow: false, font: {size: narrow ? 10 : 12}, ...more});
  plot(place, traces, {
    hovermode: "closest", margin: {l: narrow ? 24 : 60, r: narrow ? 34 : 60, t: 36, b: 16},
    xaxis: {range: [-0.1, named.length + 0.1], visible: false}, yaxis: {range: [-0.06, 1.06], visible: false},
    shapes: [...named.keys(), named.length].map((x) => (
      {type: "line", x0: x, x1: x, y0: 0, y1: 1, line: {color: colour("--faint"), width: 1}})),
    annotations: [
      ...marks.map(({x, y, text}) => label(x, y, text, {xanchor: "left", xshift: 4, bgcolor: colour("--ground"), opacity: 0.9})),
      ...[...named.map(({name}) => name), "dev"].map((name, x) => label(
        x, 1, short(narrow ? name.split(".").pop() : name, narrow ? 12 : 28), {yanchor: "bottom", yshift: 12})),
    ],
  });
}

// Viridis from 0 to 1, without its darkest and lightest ends, which a dark or light page would swallow.
function shade(share) {
  const stops = [[72, 77, 141], [45, 130, 142], [53, 160, 116], [122, 190, 70], [190, 190, 40]];
  const at = share * (stops.length - 1), from = Math.min(Math.floor(at), stops.length - 2);
  const mixed = stops[from].map((value, channel) => Math.round(value + (at - from) * (stops[from + 1][channel] - value)));
  return `rgb(${mixed.join(",")})`;
}

function drawTraining() {
  const root = document.getElementById("training"), runs = sweep.runs.filter((run) => ticked.has(run));
  const styles = runs.map((_, place) => (
    {color: COLOURS[place % COLOURS.length], dash: DASHES[Math.floor(place / COLOURS.length) % DASHES.length], width: 1.5}));
  const metrics = [...new Set(sweep.runs.flatMap((run) => Object.keys(run.curves)))];
  root.querySelector(".legend").replaceChildren(...runs.map((run, place) => {
    const swatch = element("i"), item = element("li");
    swatch.style.borderTopColor = styles[place].color;
    swatch.style.borderTopStyle = styles[place].dash === "solid" ? "solid" : styles[place].dash === "dot" ? "dotted" : "dashed";
    const settings = sweep.settings.map((name, at) => `${name}=${shown(run.values[at])}`).join(" ");
    item.append(swatch, `${run.name}: ${settings}`);
    return item;
  }));
  const grid = root.querySelector(".grid");
  while (grid.children.length < metrics.length) grid.append(element("div", "", {className: "plot"}));
  metrics.forEach((metric, at) => plot(grid.children[at], runs.flatMap((run, place) => {
    const [steps, values] = run.curves[metric] ?? [[], []];
    return {type: "scatter", mode: metric.startsWith("dev/") ? "lines+markers" : "lines", line: styles[place], x: steps, y: values,
      name: "", hovertemplate: `run ${plain(run.name)}, step %{x}: %{y:.5~g}<extra></extra>`};
  }), {
    hovermode: "closest", margin: {t: 30}, xaxis: axis("step", {rangemode: "tozero"}), yaxis: axis("", {tickformat: ".4~g"}),
    title: {text: plain(metric), font: {size: 13}, x: 0.02, xanchor: "left"},
  }));
}
