"use strict";
// Draws the figures of the page in the colours of the system's setting.
(function () {
  const content = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const print = window.matchMedia("print");
  const config = { displayModeBar: false, responsive: true, scrollZoom: false };

  function recoloured(value, table) {
    if (typeof value === "string") {
      return Object.hasOwn(table, value) ? table[value] : value;
    }
    if (Array.isArray(value)) {
      return value.map((item) => recoloured(item, table));
    }
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([key, item]) => [key, recoloured(item, table)]),
      );
    }
    return value;
  }

  function shown(name) {
    const chosen = document.querySelector(`input[name="${name}-view"]:checked`);
    return content.figures[name][chosen === null ? 0 : Number(chosen.value)];
  }

  function draw(place) {
    const table = dark.matches && !print.matches ? content.dark : {};
    const figure = recoloured(shown(place.dataset.figure), table);
    Plotly.react(place, figure.data, figure.layout, config);
  }

  function drawAll() {
    document.querySelectorAll("[data-figure]").forEach(draw);
  }

  drawAll();
  dark.addEventListener("change", drawAll);
  print.addEventListener("change", drawAll);
  document.querySelectorAll(".switch").forEach((group) => {
    group.addEventListener("change", () => {
      draw(group.closest("section").querySelector("[data-figure]"));
    });
  });
})();
