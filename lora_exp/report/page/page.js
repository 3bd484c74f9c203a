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

// Replaces the still pictures of a figure with charts that answer the pointer and fill the width of the page.
async function drawCharts(figure) {
  const row = document.createElement("div");
  row.className = "charts";
  figure.append(row);
  const AXIS = 60; // pixels of the labels beside a chart
  const specs = Array.from(figure.querySelectorAll("script.chart"), (script) => JSON.parse(script.textContent));
  try {
    const panels = specs.map(() => row.appendChild(document.createElement("div")));
    await Promise.all(specs.map((spec, i) => {
      const panel = panels[i];
      const columns = Math.max(1, Math.floor((panel.clientWidth - AXIS) / spec.usermeta.entry));
      const legend = { ...spec.config.legend, columns };
      const sized = { ...spec, width: "container", autosize: { type: "fit-x", contains: "padding" },
                      config: { ...spec.config, legend } };
      return vegaEmbed(panel, sized, { renderer: "svg", actions: false });
    }));
    figure.querySelector(".still").remove();
    figure.querySelector("figcaption").hidden = false; // the still picture has the title in it
  } catch (error) {
    row.remove(); // the still picture says the same
    console.error(error);
  }
}

for (const figure of document.querySelectorAll("figure")) drawCharts(figure);
