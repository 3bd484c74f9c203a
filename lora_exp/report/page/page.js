// Sorts a table by the column whose header button is pressed: numbers by value, words by their letters, "-" last.
function valueOf(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = Number.parseFloat(text.replaceAll(",", ""));
  return { text, number, missing: text === "-" };
}

function compareRows(a, b, direction) {
  if (a.missing !== b.missing) return a.missing ? 1 : -1;
  if (!Number.isNaN(a.number) && !Number.isNaN(b.number) && a.number !== b.number) return direction * (a.number - b.number);
  return direction * a.text.localeCompare(b.text, "en", { numeric: true });
}

function sortTable(header) {
  const table = header.closest("table"), body = table.tBodies[0], column = header.cellIndex;
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const rows = Array.from(body.rows, (row) => ({ row, ...valueOf(row, column) }));
  rows.sort((a, b) => compareRows(a, b, ascending ? 1 : -1));
  body.append(...rows.map(({ row }) => row));
}

for (const header of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  button.addEventListener("click", () => sortTable(header));
  header.append(button);
}
