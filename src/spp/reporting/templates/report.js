"use strict";
// Sort buttons and copy buttons; the page is complete without them.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      // Words go up first, numbers down: the largest are what one looks for.
      const before = heading.getAttribute("aria-sort");
      const words = !("key" in table.tBodies[0].rows[0].cells[column].dataset);
      const ascending = before ? before === "descending" : words;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const sign = ascending ? 1 : -1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => sign * compare(a.cells[column], b.cells[column]));
      table.tBodies[0].append(...rows);
    });
  });
}

function compare(a, b) {
  if (!("key" in a.dataset)) return a.textContent.localeCompare(b.textContent, "en", { numeric: true });
  const [left, right] = [a, b].map((cell) => number(cell.dataset.key));
  return left === right ? 0 : left - right;
}

function number(key) {
  // Python's words for numbers; what is not known counts as the least.
  if (key === "inf") return Number.MAX_VALUE;
  return key === "" || key === "nan" ? -Number.MAX_VALUE : Number(key);
}

for (const command of document.querySelectorAll(".command pre")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-live", "polite");
  button.setAttribute("aria-description", command.getAttribute("aria-label"));
  command.after(button);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command);
      button.textContent = "Selected";
    }
  });
}
