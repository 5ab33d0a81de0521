// Puts the parts together. A picture that the data cannot fill is left out.
function fillHead() {
  document.title = `Sweep ${sweep.title}`;
  document.querySelector("h1").textContent = `Sweep ${sweep.title}`;
  document.getElementById("notes").append(...sweep.notes.map((note) => (
    element("li", note, {className: note.startsWith("warning") ? "warning" : ""}))));
  document.getElementById("commands").append(...sweep.commands.flatMap(([what, command]) => [
    element("dt", what), wrapped("dd", element("pre", command))]));
  document.querySelector("footer").textContent = `promcse_pl ${sweep.version}`;
}

function fillFailures() {
  document.getElementById("failures").hidden = !sweep.failures.length;
  document.querySelector("#failures dl").append(...sweep.failures.flatMap(({name, state, messages, log}) => [
    element("dt", `${name}: ${state}`),
    wrapped("dd", ...messages.map((message) => element("pre", message)), element("code", log))]));
}

function wrapped(tag, ...children) {
  const made = element(tag);
  made.append(...children);
  return made;
}

function startTable() {
  const status = document.getElementById("status"), each = document.getElementById("each");
  const states = [...new Set(sweep.runs.map((run) => run.state))];
  status.append(...["", ...states].map((value) => element("option", value || "all", {value})));
  document.getElementById("grouping").hidden = sweep.rows.grouped.length === sweep.rows.each.length;
  each.checked = document.getElementById("grouping").hidden;
  const best = sweep.rows.each.map(({runs}) => sweep.runs[runs[0]]).filter((run) => Object.keys(run.curves).length);
  best.slice(0, 4).forEach((run) => ticked.add(run));
  const fill = () => fillTable(drawTraining);
  document.getElementById("filter").addEventListener("input", fill);
  status.addEventListener("change", fill);
  each.addEventListener("change", fill);
  fill();
}

function startCharts() {
  const swept = sweep.settings.length - (SEED < 0 ? 0 : 1);
  const show = (section, possible, draw) => {
    document.getElementById(section).hidden = !possible;
    if (possible) draw();
  };
  show("heat", finished.length && swept > 1, () => withMenus("heat", ["across", "up"], drawHeat));
  show("curve", finished.length && swept > 0, () => withMenus("curve", ["setting"], drawCurve));
  show("parallel", finished.length && sweep.settings.length, () => {
    const draw = () => drawParallel(document.querySelector("#parallel .plot"));
    drawn.push(draw);
    draw();
  });
  show("training", sweep.runs.some((run) => Object.keys(run.curves).length), () => {
    drawn.push(drawTraining);
    drawTraining();
  });
}

fillHead();
startTable();
startCharts();
fillFailures();
const redraw = () => drawn.forEach((draw) => draw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
matchMedia("(max-width: 620px)").addEventListener("change", redraw);
