// The runs table: sorted by its head's buttons, filtered by words and status, with a tick for each row to draw.
const ticked = new Set();
const table = {column: 0, descending: false, rows: []};

function columns(apart) {
  const settings = sweep.settings.map((name, place) => ({name, place})).filter(({place}) => apart || place !== SEED);
  const spread = (values) => ({
    value: values.length ? mean(values) : null,
    text: values.length ? fixed(mean(values)) + (deviation(values) === null ? "" : ` ± ${fixed(deviation(values))}`) : "",
  });
  const done = (runs) => runs.filter((run) => run.state === "finished");
  const there = (values) => values.filter((value) => value !== null && value !== undefined);
  return [
    {name: "#", number: true, cell: ({rank}) => ({value: rank, text: rank === null ? "" : String(rank)})},
    {name: "run", cell: ({runs}) => ({value: runs[0].name, text: runs.map((run) => run.name).join(",")})},
    ...settings.map(({name, place}) => ({
      name, number: true, cell: ({runs}) => ({value: runs[0].values[place], text: shown(runs[0].values[place])}),
    })),
    {name: "dev", number: true, cell: ({runs}) => {
      if (done(runs).some((run) => run.not_finite)) return {value: null, text: "nan"};
      if (done(runs).length) return spread(there(done(runs).map((run) => run.dev)));
      const soFar = there(runs.map((run) => run.dev));
      return {value: null, text: soFar.length ? `(${fixed(Math.max(...soFar))})` : ""};
    }},
    ...(apart ? [] : [{name: "n", number: true, cell: ({runs}) => ({value: done(runs).length, text: String(done(runs).length)})}]),
    ...sweep.tasks.map((task) => ({name: task, number: true, cell: ({runs}) => spread(there(runs.map((run) => run.tests[task])))})),
    {name: "time", number: true, cell: ({runs}) => {
      const times = there((done(runs).length ? done(runs) : runs).map((run) => run.seconds));
      return {value: times.length ? mean(times) : null, text: times.length ? duration(mean(times)) : ""};
    }},
    {name: "status", cell: ({runs}) => {
      const counts = [...grouped(runs, (run) => run.state)];
      const text = counts.map(([state, of]) => (runs.length === 1 ? state : `${of.length} ${state}`)).join(", ");
      return {value: text, text};
    }},
  ];
}

function fillTable(onTick) {
  const apart = document.getElementById("each").checked;
  const heads = columns(apart);
  table.column = Math.min(table.column, heads.length - 1);
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = document.getElementById("status").value;
  const all = sweep.rows[apart ? "each" : "grouped"].map(({rank, runs}) => {
    const row = {rank, runs: runs.map((place) => sweep.runs[place])};
    return {...row, cells: heads.map((head) => head.cell(row))};
  });
  const texts = ({cells}) => cells.map(({text}, place) => `${heads[place].name}=${text}`.toLowerCase()).join("\n");
  const visible = all
    .filter((row) => words.every((word) => texts(row).includes(word)))
    .filter((row) => !status || row.runs.some((run) => run.state === status));
  const sign = table.descending ? -1 : 1;
  visible.sort((first, second) => {
    const [a, b] = [first, second].map((row) => row.cells[table.column].value);
    return a === null || b === null ? compare(a, b) : sign * compare(a, b);  // what has no value is last either way
  });
  document.getElementById("count").textContent = `${visible.length} of ${all.length} rows`;
  document.getElementById("runs").replaceChildren(tableHead(heads, onTick), tableBody(heads, visible, onTick));
}

function tableHead(heads, onTick) {
  const row = element("tr");
  row.append(element("th", "draw", {scope: "col", className: "plain"}));
  heads.forEach((head, place) => {
    const cell = element("th", "", {scope: "col", className: head.number ? "number" : ""});
    const button = element("button", head.name, {type: "button"});
    if (place === table.column) cell.setAttribute("aria-sort", table.descending ? "descending" : "ascending");
    button.addEventListener("click", () => {
      table.descending = place === table.column && !table.descending;
      table.column = place;
      fillTable(onTick);
      document.querySelectorAll("#runs th button")[place].focus();
    });
    cell.append(button);
    row.append(cell);
  });
  const head = element("thead");
  head.append(row);
  return head;
}

function tableBody(heads, visible, onTick) {
  const body = element("tbody");
  for (const {rank, runs, cells} of visible) {
    const row = element("tr"), tick = element("input", "", {type: "checkbox"}), first = element("td");
    if (rank !== null) row.dataset.rank = rank;
    tick.checked = runs.every((run) => ticked.has(run));
    tick.indeterminate = !tick.checked && runs.some((run) => ticked.has(run));
    tick.setAttribute("aria-label", `draw ${runs.map((run) => run.name).join(",")}`);
    tick.addEventListener("change", () => {
      runs.forEach((run) => (tick.checked ? ticked.add(run) : ticked.delete(run)));
      onTick();
    });
    first.append(tick);
    row.append(first);
    cells.forEach(({text}, place) => {
      row.append(element("td", text, {className: heads[place].number ? "number" : "", title: text}));
    });
    body.append(row);
  }
  return body;
}
