"use strict";

// "0.645 ± 0.003", "< 0.0001", "1,234.5": what comes first is the number; anything else is sorted as text.
function sortKey(text) {
  const number = /^[<+]?\s*(-?[\d,]*\.?\d+)/.exec(text.trim());
  return number ? Number(number[1].replaceAll(",", "")) : text.trim();
}

function compareKeys(first, second) {
  if (typeof first === "number" && typeof second === "number") return first - second;
  if (typeof first === typeof second) return first.localeCompare(second, undefined, { numeric: true });
  return typeof first === "number" ? -1 : 1;
}

// Turn a head's text into a button that asks for an order: numbers largest first, texts from a to z, then the reverse.
function sortButton(head, numeric, sort) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    const ascending = before ? before === "descending" : !numeric();
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    sort(ascending);
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const key = (row) => sortKey(row.cells[column].textContent);
    const numeric = () => [...body.rows].some((row) => typeof key(row) === "number");
    sortButton(head, numeric, (ascending) => {
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort((a, b) => {
        if (typeof a[0] !== typeof b[0]) return compareKeys(a[0], b[0]); // what was not measured stays last
        return ascending ? compareKeys(a[0], b[0]) : compareKeys(b[0], a[0]);
      });
      body.append(...rows.map((pair) => pair[1]));
    });
  });
}

// Printed pages show everything.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
