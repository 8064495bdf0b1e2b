(function browseQueries() {
  const page = 20;
  const data = JSON.parse(document.getElementById("values").textContent);
  const part = (id) => document.getElementById(id);
  const chosen = (id) => Number(part(id).value);
  const table = part("query-table");
  let order = null; // [column, ascending]
  let limit = page;

  function options(id, names, selected) {
    const made = names.map(([value, name]) => new Option(name, value, false, value === selected));
    part(id).replaceChildren(...made);
  }

  // The systems that the chosen set and measure have.
  function chooseSystems() {
    const set = data.sets[chosen("set")];
    const measured = data.systems.map((name, row) => [row, name]).filter(([row]) => set.values[chosen("measure")][row]);
    const known = measured.map(([row]) => row);
    const against = known.includes(set.reference) ? set.reference : known[0];
    const system = known.find((row) => row > against) ?? known.find((row) => row !== against);
    options("system", measured, system === undefined ? against : system);
    options("against", measured, against);
  }

  function cell(kind, text, style) {
    const made = document.createElement(kind);
    made.textContent = text;
    if (style) made.className = style;
    return made;
  }

  function draw() {
    const set = data.sets[chosen("set")];
    const values = set.values[chosen("measure")];
    const measured = data.systems.map((_, row) => row).filter((row) => values[row]);
    const [system, against] = [values[chosen("system")], values[chosen("against")]];
    const wanted = part("filter").value.toLowerCase();
    const show = part("show").value;
    let rows = [];
    set.queries.forEach((query, row) => {
      const difference = system && against ? Number((system[row] - against[row]).toFixed(4)) : 0;
      const result = difference > 0 ? "won" : difference < 0 ? "lost" : "tied";
      const text = set.texts ? [set.texts[row]] : [];
      const found = [query, ...text].some((part) => part.toLowerCase().includes(wanted));
      if ((show === "all" || show === result) && found) {
        rows.push([query, ...text, ...measured.map((column) => values[column][row]), difference]);
      }
    });
    if (order !== null) {
      const [column, ascending] = order;
      rows.sort((a, b) => (ascending ? 1 : -1) * compareKeys(a[column], b[column]));
    }
    part("count").textContent = `${rows.length} of ${set.queries.length} queries`;
    part("more").hidden = rows.length <= limit;
    const body = document.createElement("tbody");
    for (const row of rows.slice(0, limit)) {
      const line = document.createElement("tr");
      row.forEach((value, column) => {
        const signed = column === row.length - 1 && value > 0 ? "+" : "";
        if (column === 0) line.append(cell("th", value));
        else if (typeof value === "string") line.append(cell("td", value, "text"));
        else line.append(cell("td", signed + value.toFixed(4), "number"));
      });
      line.firstChild.scope = "row";
      body.append(line);
    }
    table.replaceChildren(heads(measured), body);
  }

  function heads(measured) {
    const line = document.createElement("tr");
    const [system, against] = [data.systems[chosen("system")], data.systems[chosen("against")]];
    const text = data.sets[chosen("set")].texts ? ["text"] : [];
    const names = ["query", ...text, ...measured.map((column) => data.systems[column]), `${system} − ${against}`];
    names.forEach((name, column) => {
      const head = cell("th", name);
      head.scope = "col";
      line.append(head);
      if (order && order[0] === column) head.setAttribute("aria-sort", order[1] ? "ascending" : "descending");
      sortButton(head, () => column > text.length, (ascending) => {
        order = [column, ascending];
        draw();
        table.tHead.rows[0].cells[column].firstChild.focus();
      });
    });
    const made = document.createElement("thead");
    made.append(line);
    return made;
  }

  function changed() {
    limit = page;
    draw();
  }

  options("set", data.sets.map((set, row) => [row, set.name]), 0);
  options("measure", data.measures.map((name, row) => [row, name]), 0);
  chooseSystems();
  for (const id of ["set", "measure"]) {
    part(id).addEventListener("change", () => {
      order = null;
      chooseSystems();
      changed();
    });
  }
  for (const id of ["system", "against", "show"]) part(id).addEventListener("change", changed);
  part("filter").addEventListener("input", changed);
  part("controls").addEventListener("submit", (event) => event.preventDefault());
  part("more").addEventListener("click", () => {
    limit += 10 * page;
    draw();
  });
  part("browser").hidden = false;
  draw();
})();
