"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);

/* A plot is drawn when it is first seen: it takes its width from the page. */
function draw(figure) {
  for (const plot of figure.querySelectorAll(".panel:not([hidden]) .plot:empty")) {
    const { data, layout } = figures[plot.dataset.figure];
    Plotly.newPlot(plot, data, layout, { displayModeBar: false, responsive: true });
  }
}

for (const figure of document.querySelectorAll("figure")) {
  const select = figure.querySelector("select");
  select?.addEventListener("change", () => {
    for (const panel of figure.querySelectorAll(".panel")) {
      panel.hidden = panel.dataset.choice !== select.value;
    }
    draw(figure);
  });
  draw(figure);
}

/* Paper has another width than the screen. */
function fit(width) {
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    if (plot.offsetParent) Plotly.relayout(plot, { width, autosize: !width });
  }
}
addEventListener("beforeprint", () => fit(330));
addEventListener("afterprint", () => fit(undefined));
